"""linear_logprobs row by row: ignored rows, NaN, banned tokens, ties, exact log-probs, second derivatives, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_exactly_zero_whatever_they_hold(backend, device, dtype, bad):
    """Zero out and zero gradient even where hidden and the upstream are not finite; the others are as without them."""
    clean = T.make_head(70, 33, 257, dtype=dtype, bias=True, masked=0.5, device=device)
    ignored = clean.targets == -100
    upstream = T.randn(70, seed=3, device=device)

    def results(hidden, upstream):
        leaves = T.leaves_of((hidden, clean.weight, clean.bias))
        out = rk.linear_logprobs(leaves[0], leaves[1], clean.targets, leaves[2], outputs=T.OUTPUTS, backend=backend)
        through = [out.logprobs, out.logsumexp, out.entropy]
        return out, T.gradients(through, [upstream] * 3, leaves)

    want, want_grads = results(clean.hidden, upstream)
    hidden = clean.hidden.clone()
    hidden[ignored] = bad
    got, grads = results(hidden, torch.where(ignored, bad, upstream))
    for value, other in zip(got, want, strict=True):
        assert (value[ignored] == 0).all()
        assert torch.equal(value, other)
    assert (grads[0][ignored] == 0).all()
    for grad, other in zip(grads, want_grads, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_ignored(backend, device, dtype):
    head = T.make_head(10, 33, 129, dtype=dtype, bias=True, masked=1.0, device=device)
    leaves = T.leaves_of((head.hidden.fill_(math.nan), head.weight, head.bias))
    out = rk.linear_logprobs(leaves[0], leaves[1], head.targets, leaves[2], outputs=T.OUTPUTS, backend=backend)
    assert all((value == 0).all() for value in out)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_counted_row_stays_in_its_row(backend, device, dtype, bad):
    head = T.make_head(70, 33, 257, dtype=dtype, device=device)
    row = 37  # inside a row tile, with neighbours on both sides
    others = torch.arange(70, device=device) != row
    hidden = head.hidden.clone()
    hidden[row, 5] = bad

    def results(hidden):
        leaf = hidden.requires_grad_()
        out = rk.linear_logprobs(leaf, head.weight, head.targets, outputs=T.OUTPUTS, backend=backend)
        return out, torch.autograd.grad(out.logprobs.sum(), leaf)[0]

    (got, grad), (want, want_grad) = results(hidden), results(head.hidden.clone())
    for name, value, other in zip(got._fields, got, want, strict=True):
        assert torch.equal(value[others], other[others]), name
    assert torch.isnan(torch.stack([got.logprobs[row], got.entropy[row]])).all()
    assert torch.equal(grad[others], want_grad[others])
    assert not grad[row].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("banned", ["some", "whole tiles", "all but one", "the target"])
def test_tokens_banned_by_a_bias_of_minus_infinity(backend, device, dtype, banned):
    """p = 0 there and 0 log 0 = 0: entropy and every gradient stay finite; a banned target has log-prob -inf."""
    head = T.make_head(66, 33, 4500, dtype=dtype, bias=True, device=device)
    where = {
        "some": torch.arange(4500, device=device) % 7 == 3,
        "whole tiles": torch.arange(4500, device=device) < 2100,  # the first tile has no finite maximum at all
        "all but one": torch.arange(4500, device=device) != 4321,
        "the target": torch.zeros(4500, dtype=torch.bool, device=device),
    }[banned]
    allowed = (~where).nonzero()[:, 0]
    targets = allowed[head.targets % allowed.numel()]
    if banned == "the target":
        where[targets[11]] = True
        targets = torch.where(torch.arange(66, device=device) == 11, targets, (targets + 1) % 4500)
        targets = torch.where(where[targets] & (torch.arange(66, device=device) != 11), targets + 1, targets)
    head = head._replace(targets=targets, bias=head.bias.masked_fill(where, -math.inf))
    outputs = ("entropy", "is_top1", "log_sum_sq_probs")  # the mean logit is -inf

    def op(*args, **options):
        return rk.linear_logprobs(*args, backend=backend, **options)

    # Upstreams that do not nearly cancel in the sum over rows: with one token left that sum is the whole gradient.
    T.check_linear_logprobs(op, head, outputs=outputs, seed=8)
    out = op(*head, outputs=("mean_logit", "entropy"))
    assert out.entropy.isfinite().all() and out.mean_logit.isneginf().all()
    assert out.logprobs.isneginf().sum() == (1 if banned == "the target" else 0)


@pytest.mark.parametrize("offset", [64.0, 4096.0, -4096.0, 65536.0])  # ulp of fp32 there: 8e-6, 5e-4, 5e-4, 8e-3
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_stay_exact_under_a_large_logsumexp(backend, device, dtype, offset):
    """With exact logits the log-prob is exact to its own ulp, however large the logsumexp: max and log-sum are apart.

    D = 2 and hidden = (1, 1): logits are (offset + k/16), which fp32 holds, as products that every dtype holds.
    """
    v, n = 300, 33
    steps = (torch.arange(v, dtype=torch.float64, device=device) * 7 % 64) / 16
    weight = torch.stack([torch.full_like(steps, offset / 64), steps], -1).to(dtype)
    hidden = torch.tensor([64.0, 1.0], device=device).expand(n, 2).to(dtype)
    targets = torch.arange(n, device=device)
    leaves = T.leaves_of((hidden.clone(), weight))
    out = rk.linear_logprobs(*leaves, targets, outputs=("entropy",), backend=backend)
    logp = (steps + offset).log_softmax(-1)
    assert (out.logprobs.double() - logp[:n]).abs().max() <= 1e-6
    assert (out.entropy.double() + (logp.exp() * logp).sum()).abs().max() <= 1e-6
    exact = torch.logsumexp(steps + offset, -1)
    assert (out.logsumexp.double() - exact).abs().max() <= exact.abs() * 2**-23
    grad_hidden = torch.autograd.grad(out.logprobs.sum(), leaves[0])[0][:, 1].double()
    want = steps[:n] - logp.exp() @ steps  # d logp_y / d hidden[1] = w_y - E[w]
    assert (
        T.relative_error(grad_hidden, want) <= {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    )


@pytest.mark.parametrize(
    "gap", [2.0, 8.0, 12.0, 20.0]
)  # 1 - p_y = 0.1, 3e-4, 6e-6, and 2e-9, which 1 - p_y cannot hold
def test_the_gradient_of_a_certain_token(backend, device, gap):
    """p_y - 1 is right to one rounding of 1, and what the target gains the others lose."""
    bias = torch.tensor([gap, 0.0], device=device, requires_grad=True)
    zero = torch.zeros(1, 1, device=device), torch.zeros(2, 1, device=device)
    out = rk.linear_logprobs(*zero, torch.zeros(1, dtype=torch.int64, device=device), bias, backend=backend)
    (grad,) = torch.autograd.grad(out.logprobs.sum(), bias)
    p_other = torch.sigmoid(torch.tensor(-gap, dtype=torch.float64, device=device))
    assert (grad.double() - torch.stack([p_other, -p_other])).abs().max() <= 2**-23
    assert abs(grad[1].double() + p_other) <= 1e-6 * p_other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tied",
    [
        (0, 1),  # neighbours
        (3, 19),  # the same lane of two vectors
        (7, 2055),  # tiles apart
        (127, 128),  # the last of a tile and the first of the next
        (0, 4498),  # the ends
        (4490, 4498),  # both in the last, unfilled tile
    ],
)
def test_top1_is_the_first_of_equal_maxima(backend, device, dtype, tied):
    weight = (torch.arange(4499, device=device) % 5).to(dtype)[:, None]
    weight[list(tied)] = 9.0
    hidden = torch.ones(4, 1, device=device, dtype=dtype)
    targets = torch.tensor([tied[0], tied[1], 2, -100], device=device)
    out = rk.linear_logprobs(hidden, weight, targets, outputs=("is_top1",), backend=backend)
    assert out.is_top1.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_top1_of_equal_logits_is_token_0(backend, device):
    hidden, weight = torch.zeros(3, 4, device=device), torch.randn(40, 4).to(device)
    out = rk.linear_logprobs(
        hidden, weight, torch.tensor([0, 1, 39], device=device), outputs=("is_top1",), backend=backend
    )
    assert out.is_top1.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 300, 4499])
def test_top1_where_the_target_is_the_best_or_the_second_best(backend, device, v, dtype):
    hidden, weight, _, bias = T.make_head(130, 33, v, dtype=dtype, bias=True, device=device)
    best = T.plain_logits(hidden, weight, bias).topk(2, dim=-1)
    decided = best.values[:, 0] - best.values[:, 1] > 1e-4
    assert decided.float().mean() > 0.9
    for rank, want in ((0, 1.0), (1, 0.0)):
        out = rk.linear_logprobs(hidden, weight, best.indices[:, rank], bias, outputs=("is_top1",), backend=backend)
        assert (out.is_top1[decided] == want).all()


@pytest.mark.parametrize("v", [1, 2, 300, 4499])
def test_a_uniform_distribution_has_its_closed_forms(backend, device, v):
    hidden, weight = torch.zeros(3, 4, device=device), torch.zeros(v, 4, device=device)
    targets = torch.tensor([0, v // 2, v - 1], device=device)
    out = rk.linear_logprobs(hidden, weight, targets, outputs=T.OUTPUTS, backend=backend)
    for value, want in (
        (out.logprobs, -math.log(v)),
        (out.logsumexp, math.log(v)),
        (out.entropy, math.log(v)),
        (out.mean_logit, 0.0),
        (out.log_sum_sq_probs, -math.log(v)),
    ):
        torch.testing.assert_close(value, torch.full_like(value, want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4, 7), (70, 33, 2050)])
def test_float64_in_float64_out(device, shape):
    """Also what "auto" does with float64: the kernels compute in fp32."""
    head = T.make_head(*shape, dtype=torch.float64, bias=True, masked=0.3, device=device)
    for backend in ("reference", "auto"):
        T.check_linear_logprobs(lambda *a, b=backend, **k: rk.linear_logprobs(*a, backend=b, **k), head)
