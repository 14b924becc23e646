"""linear_kl: both directions against fp64, from 1e-8 nats near the reference to tens of nats away from it."""

import functools
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["policy_ref", "ref_policy"]
SHAPES = [  # N, D, D', V
    (0, 8, 8, 33),  # no rows
    (1, 1, 1, 1),  # a vocabulary of one: KL 0
    (5, 1, 3, 2),  # D = 1
    (63, 33, 17, 127),  # odd; D' < D; below the tile sizes
    (64, 64, 64, 128),  # exactly one tile
    (65, 33, 64, 257),  # just over; D' > D
    (70, 1040, 48, 2049),  # one model far wider than the other; a second vocabulary tile of one token
    (66, 64, 64, 8191),  # prime, several tiles
]
OPTIONS = [
    {"temperature": 0.6},  # divides both models' logits
    {"logit_scale": -0.5},  # the reference takes it too
    {"logit_softcap": 2.0},
    {"logit_scale": 0.5, "ref_logit_scale": 2.0},  # each its own
    {"logit_softcap": 30.0, "ref_logit_softcap": 3.0},
    {"temperature": 1.7, "logit_scale": 0.5, "logit_softcap": 4.0, "ref_logit_scale": 1.5, "ref_logit_softcap": 2.0},
]


def run(backend):
    return functools.partial(rk.linear_kl, backend=backend)


@pytest.mark.parametrize(("shape", "dtype", "direction"), every_pair(SHAPES, DTYPES, DIRECTIONS))
def test_shapes(backend, device, shape, dtype, direction):
    n, d, ref_d, v = shape
    inputs = T.make_kl_inputs(n, d, v, ref_d=ref_d, dtype=dtype, bias=True, masked=0.25, device=device)
    T.check_linear_kl(run(backend), inputs, direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(backend, device, options, direction):
    inputs = T.make_kl_inputs(65, 33, 257, ref_d=20, bias=True, masked=0.25, device=device)
    T.check_linear_kl(run(backend), inputs, direction=direction, **options)


@pytest.mark.parametrize("kl", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 10.0])  # the first step of training ... far gone
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_and_far_from_the_reference(backend, device, dtype, direction, kl):
    """Relative error as in `kl_relative_limit`, and the gradient as exact as eager's, at every distance."""
    inputs = T.make_kl_inputs(66, 64, 2050, kl=kl, dtype=dtype, device=device)
    scaler = 2.0**15 if dtype == torch.float16 and kl < 1e-2 else 1.0
    truth = T.check_linear_kl(run(backend), inputs, direction=direction, upstream_scale=scaler)
    assert kl / 4 < truth.mean() < kl * 4, "the inputs are not as far apart as the test says"


@pytest.mark.parametrize("kl", [1e-8, 1e-6])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_near_the_reference_with_large_logits(backend, device, direction, kl):
    """A common offset of 200 in both models' logits cancels in the ratios and must not cost their bits."""
    inputs = T.make_kl_inputs(33, 2, 2050, kl=kl, dtype=torch.bfloat16, device=device)
    ones = torch.full_like(inputs.hidden[:, :1], 16.0)
    offset = torch.full_like(inputs.weight[:, :1], 12.5)  # the product 200 is exact and the same for every token
    hidden, weight = torch.cat([inputs.hidden, ones], 1), torch.cat([inputs.weight, offset], 1)
    got = rk.linear_kl(hidden, weight, hidden, weight, bias=inputs.bias, direction=direction, backend=backend)
    zero = torch.zeros_like(inputs.bias)
    x, y = (T.plain_logits(hidden, weight, b, dtype=torch.float32) for b in (inputs.bias, zero))
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)  # exact KL of the fp32 logits
    if direction == "ref_policy":
        log_p, log_q = log_q, log_p
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    # The logits themselves are rounded to 1.5e-5, so only their own KL can be asked for, to the noise of another order.
    assert (got >= 0).all()
    assert ((got.double() - truth).abs() <= 0.2 * truth + 2e-10).all(), (got, truth)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_models_are_exactly_0(backend, device, dtype, direction):
    inputs = T.make_kl_inputs(66, 64, 2050, kl=0, dtype=dtype, bias=True, device=device)
    leaves = T.leaves_of((inputs.hidden, inputs.weight, inputs.bias))
    kl = rk.linear_kl(
        leaves[0], leaves[1], inputs.ref_hidden, inputs.ref_weight, bias=leaves[2], ref_bias=inputs.ref_bias,
        direction=direction, backend=backend,
    )  # fmt: skip
    assert (kl == 0).all()
    assert all(grad.abs().max() <= 1e-5 for grad in torch.autograd.grad(kl.sum(), leaves))


@pytest.mark.parametrize("kind", ["peaked", "large", "negative", "positive"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_apart_without_overflow(backend, device, direction, kind):
    """Tens of nats (peaked) to ten thousand (large): the log-ratios are past what expm1 holds."""
    inputs = T.make_kl_inputs(33, 16, 2050, dtype=torch.float32, logits=kind, device=device)
    truth = T.check_linear_kl(run(backend), inputs, direction=direction)
    assert truth.max() > {"peaked": 20, "large": 1000}.get(kind, 1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_in_one_token_near_in_all_others(backend, device, direction):
    """One rare token's log-ratio is 60, its probability e^-60: nothing of it may overflow, nor swallow the rest."""
    inputs = T.make_kl_inputs(9, 16, 300, kl=1e-4, dtype=torch.float32, bias=True, device=device)
    bias, ref_bias = inputs.bias.clone(), inputs.ref_bias.clone()
    (bias if direction == "policy_ref" else ref_bias)[7] -= 130.0
    (ref_bias if direction == "policy_ref" else bias)[7] -= 60.0
    T.check_linear_kl(run(backend), inputs._replace(bias=bias, ref_bias=ref_bias), direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tokens_banned_in_both_models(backend, device, direction):
    inputs = T.make_kl_inputs(33, 16, 4500, kl=1.0, bias=True, device=device)
    banned = torch.arange(4500, device=device) % 3 == 0
    banned[:2100] = True  # whole first tile
    bias, ref_bias = (b.masked_fill(banned, -math.inf) for b in (inputs.bias, inputs.ref_bias))
    options = {"direction": direction, "backend": backend}
    kl = rk.linear_kl(*inputs[:4], bias=bias, ref_bias=ref_bias, **options)
    left = ~banned
    want = rk.linear_kl(
        inputs.hidden, inputs.weight[left], inputs.ref_hidden, inputs.ref_weight[left],
        bias=bias[left], ref_bias=ref_bias[left], **options,
    )  # fmt: skip
    torch.testing.assert_close(kl, want, rtol=1e-5, atol=1e-6)


def test_tokens_banned_in_one_model(backend, device):
    """p_v = 0 where q_v > 0 adds nothing to KL(p || q), which is finite; the other way round it is infinite."""
    inputs = T.make_kl_inputs(9, 16, 300, kl=1.0, bias=True, device=device)
    bias = inputs.bias.clone()
    bias[5] = -math.inf
    forward, backward = (
        rk.linear_kl(*inputs[:4], bias=bias, ref_bias=inputs.ref_bias, direction=d, backend=backend) for d in DIRECTIONS
    )
    truth = T.plain_linear_kl(*inputs[:4], bias=bias, ref_bias=inputs.ref_bias)
    torch.testing.assert_close(forward.double(), truth, rtol=1e-5, atol=2e-6)
    assert backward.isposinf().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [0.5, 1.0])
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, device, masked, bad):
    clean = T.make_kl_inputs(66, 33, 257, ref_d=20, kl=None, masked=masked, bias=True, device=device)
    upstream = T.randn(66, seed=4, device=device)

    def results(hidden, ref_hidden, upstream):
        leaves = T.leaves_of((hidden, clean.weight, clean.bias))
        kl = rk.linear_kl(
            leaves[0], leaves[1], ref_hidden, clean.ref_weight, clean.mask, bias=leaves[2], ref_bias=clean.ref_bias,
            backend=backend,
        )  # fmt: skip
        return [kl, *torch.autograd.grad(kl, leaves, upstream)]

    out = ~clean.mask
    poisoned = [
        t.masked_fill(out.view(-1, *[1] * (t.dim() - 1)), bad) for t in (clean.hidden, clean.ref_hidden, upstream)
    ]
    got, want = results(*poisoned), results(clean.hidden, clean.ref_hidden, upstream)
    assert (got[0][out] == 0).all() and (got[1][out] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_bad_counted_row_stays_in_its_row(backend, device):
    inputs = T.make_kl_inputs(70, 16, 300, device=device)
    ref_hidden = inputs.ref_hidden.clone()
    ref_hidden[37, 3] = math.nan
    got = rk.linear_kl(inputs.hidden, inputs.weight, ref_hidden, inputs.ref_weight, backend=backend)
    want = rk.linear_kl(*inputs[:4], backend=backend)
    others = torch.arange(70, device=device) != 37
    assert torch.equal(got[others], want[others]) and got[37].isnan()


def test_the_gradient_goes_to_the_policy_alone(backend, device):
    inputs = T.make_kl_inputs(9, 8, 33, bias=True, device=device)
    leaves = T.leaves_of([t for t in inputs if t is not None])
    hidden, weight, ref_hidden, ref_weight, bias, ref_bias = leaves
    rk.linear_kl(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, backend=backend).sum().backward()
    assert all(t.grad is not None for t in (hidden, weight, bias))
    assert all(t.grad is None for t in (ref_hidden, ref_weight, ref_bias))
    kl = rk.linear_kl(hidden.detach(), weight.detach(), ref_hidden, ref_weight, backend=backend)
    assert not kl.requires_grad


@pytest.mark.parametrize("need", ["h", "w", "b", "hb"])
def test_gradients_only_where_needed(backend, device, need):
    inputs = T.make_kl_inputs(65, 33, 257, bias=True, masked=0.2, device=device)
    upstream = T.randn(65, seed=5, device=device)

    def grads(which):
        tensors = dict(zip("hwb", (inputs.hidden, inputs.weight, inputs.bias), strict=True))
        leaves = {k: t.detach().requires_grad_(k in which) for k, t in tensors.items()}
        kl = rk.linear_kl(
            leaves["h"], leaves["w"], inputs.ref_hidden, inputs.ref_weight, inputs.mask, bias=leaves["b"],
            ref_bias=inputs.ref_bias, backend=backend,
        )  # fmt: skip
        kl.backward(upstream)
        assert all((leaves[k].grad is None) == (k not in which) for k in leaves)
        return {k: leaves[k].grad for k in which}

    together = grads("hwb")
    for key, grad in grads(need).items():
        torch.testing.assert_close(grad, together[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("policy", "ref"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_models_of_different_dtypes(backend, device, policy, ref):
    inputs = T.make_kl_inputs(65, 33, 2050, dtype=torch.float32, device=device)
    mixed = inputs._replace(
        hidden=inputs.hidden.to(policy), weight=inputs.weight.to(policy),
        ref_hidden=inputs.ref_hidden.to(ref), ref_weight=inputs.ref_weight.to(ref),
    )  # fmt: skip
    T.check_linear_kl(run(backend), mixed)


def test_autocast(backend, device):
    inputs = T.make_kl_inputs(65, 33, 2050, masked=0.2, device=device)
    rounded = inputs._replace(
        **{k: getattr(inputs, k).bfloat16() for k in ("hidden", "weight", "ref_hidden", "ref_weight")}
    )
    leaves = T.leaves_of(inputs[:2])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        kl = rk.linear_kl(*leaves, *inputs[2:5], backend=backend)
    truth, eager = (T.plain_linear_kl(*rounded[:5], dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert kl.dtype == torch.float32
    T.assert_no_worse_than_eager(kl.detach(), eager, truth)
    kl.sum().backward()
    exact = T.leaves_of(rounded[:2], torch.float64)
    T.plain_linear_kl(*exact, *rounded[2:5]).sum().backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == torch.float32 and T.relative_error(leaf.grad, want.grad) < 4e-3
