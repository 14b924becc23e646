"""linear_dpo_loss: equals sequence_logprobs followed by dpo_loss, in value and gradient, whatever the budget."""

import functools
import itertools
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = list(LOSS_TYPES)
SHAPES = [  # S, T, D, V
    (2, 2, 8, 5),  # one pair, one predicted token each
    (4, 17, 33, 129),  # odd; 68 rows: two row tiles that cut sequences
    (6, 64, 48, 2050),  # full row tiles; a second vocabulary tile of two tokens
]


class Batch:
    """Hidden states, head and labels of S responses under the policy, and under a reference of another width."""

    def __init__(self, s, t, d, v, *, dtype=torch.float32, device="cpu", bias=True, masked=0.3):
        hidden, self.weight, labels, self.bias = T.make_head(
            s * t, d, v, dtype=dtype, bias=bias, masked=masked, device=device
        )
        ref = T.make_head(s * t, d + 3, v, dtype=dtype, bias=bias, seed=50, device=device)
        self.hidden, self.ref_hidden = hidden.view(s, t, d), ref.hidden.view(s, t, d + 3)
        self.ref_weight, self.ref_bias = ref.weight, ref.bias
        self.labels = labels.view(s, t).clone()
        self.labels[:, : min(2, t - 1)] = -100  # the prompt
        self.labels[:, -1] = 0  # nobody is masked completely
        self.leaves = (self.hidden, self.weight, self.bias)

    def ref_args(self):
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    def ref_logps(self, **options):
        logps = T.plain_sequence_logprobs(self.ref_hidden, self.ref_weight, self.labels, self.ref_bias, **options)
        return logps.float()


def options_of(loss_type):
    return {"loss_type": loss_type, "label_smoothing": 0.2 if LOSS_TYPES[loss_type].smoothing else 0.0}


def plain_loss(leaves, batch, ref_logps, pairs, *, dtype, beta, head_options=None, **options):
    """The composition, from full logits, in `dtype`."""
    logps = T.plain_sequence_logprobs(
        leaves[0], leaves[1], batch.labels, leaves[2], dtype=dtype, **(head_options or {})
    )
    counts = (batch.labels[:, 1:] != -100).sum(-1)
    ref = None if ref_logps is None else ref_logps.to(dtype)
    out = rk.dpo_loss(logps, ref, *pairs, beta, token_counts=counts, backend="reference", **options)
    return out.losses.mean(), logps, out.rewards


def halves(size, device):
    return torch.arange(size // 2, device=device), torch.arange(size // 2, size, device=device)


def check(backend, batch, pairs, *, beta=0.3, reference="logps", head_options=None, given_pairs=True, **options):
    head_options = head_options or {}
    ref_logps = None if options["loss_type"] == "simpo" else batch.ref_logps(**head_options)
    reference_args = {} if ref_logps is None else {"ref_logps": ref_logps} if reference == "logps" else batch.ref_args()
    pair_args = {"chosen_idxs": pairs[0], "rejected_idxs": pairs[1]} if given_pairs else {}
    leaves = T.leaves_of(batch.leaves)
    got = rk.linear_dpo_loss(
        leaves[0], leaves[1], batch.labels, bias=leaves[2], beta=beta, backend=backend,
        **reference_args, **pair_args, **head_options, **options,
    )  # fmt: skip
    plain = functools.partial(
        plain_loss, batch=batch, ref_logps=ref_logps, pairs=pairs, beta=beta, head_options=head_options, **options
    )
    upstream = torch.tensor(1.7, device=batch.hidden.device)
    results = []
    for dtype in (torch.float32, torch.float64):
        own = T.leaves_of(batch.leaves, dtype)
        loss, logps, rewards = plain(own, dtype=dtype)
        results.append((loss.detach(), T.gradients([loss], [upstream], own), logps.detach(), rewards))
    (_, eager_grads, eager_logps, _), (truth, true_grads, logps, rewards) = results
    per_token = batch.labels.shape[1] - 1
    T.assert_no_worse_than_eager(
        got.policy_logps / per_token, eager_logps / per_token, logps / per_token, "policy_logps"
    )
    assert got.loss.shape == () and got.loss.dtype == torch.float32
    # A loss moves by at most its slope, here below 2, times the error of sums of up to 63 log-probs.
    torch.testing.assert_close(got.loss.double(), truth, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.chosen_rewards.double(), rewards[pairs[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.rejected_rewards.double(), rewards[pairs[1]], rtol=1e-5, atol=1e-5)
    if ref_logps is None:
        assert got.ref_logps is None
    else:
        torch.testing.assert_close(got.ref_logps, ref_logps, rtol=2e-6, atol=1e-5)
    assert not any(t.requires_grad for t in got[1:] if t is not None)
    grads = T.gradients([got.loss], [upstream], leaves)
    T.check_gradients((grads, eager_grads, true_grads), batch.hidden.dtype)


@pytest.mark.parametrize(("shape", "dtype", "reference"), every_pair(SHAPES, DTYPES, ["logps", "hidden"]))
def test_values_and_gradients(backend, device, shape, dtype, reference):
    """Log-ratios of tens of nats, as in a batch of long responses, would sit on sigmoid's flat side: a small beta."""
    batch = Batch(*shape, dtype=dtype, device=device)
    pairs = halves(shape[0], device)
    check(
        backend,
        batch,
        pairs,
        beta=0.02,
        reference=reference,
        given_pairs=False,
        loss_type="sigmoid",
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("reference", ["logps", "hidden"])
@pytest.mark.parametrize("loss_type", TYPES)
def test_loss_types(backend, device, loss_type, reference):
    batch = Batch(4, 17, 33, 129, device=device)
    check(backend, batch, halves(4, device), beta=0.05, reference=reference, **options_of(loss_type))


def test_four_responses_make_six_pairs(backend, device):
    pairs = tuple(torch.tensor(side, device=device) for side in zip(*itertools.combinations(range(4), 2), strict=True))
    check(backend, Batch(4, 17, 33, 129, device=device), pairs, beta=0.05, loss_type="sigmoid")


def test_odd_responses_with_index_pairs(backend, device):
    pairs = torch.tensor([0, 2], device=device), torch.tensor([1, 1], device=device)
    check(backend, Batch(3, 17, 33, 129, device=device), pairs, beta=0.05, loss_type="sigmoid")


@pytest.mark.parametrize("head_options", [{"temperature": 0.7, "logit_scale": 0.5, "logit_softcap": 3.0}])
def test_head_options_hold_for_policy_and_reference(backend, device, head_options):
    batch = Batch(4, 17, 33, 129, device=device)
    for reference in ("logps", "hidden"):
        check(
            backend, batch, halves(4, device), beta=0.05, reference=reference, head_options=head_options,
            loss_type="sigmoid",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", ["logps", "hidden"])
def test_small_and_large_budgets_agree(backend, device, dtype, reference, kept_logits):
    """S T V fp32 logits are 12 MiB here: a third is kept for backward with 8 MiB (on CUDA none), all with 64."""
    batch = Batch(4, 48, 64, 17000, dtype=dtype, device=device)
    ref = {"ref_logps": batch.ref_logps()} if reference == "logps" else batch.ref_args()
    results = []
    try:
        for mebibytes in (8, 64):
            rk.set_workspace_budget(mebibytes)
            leaves = T.leaves_of(batch.leaves)
            out = rk.linear_dpo_loss(
                leaves[0], leaves[1], batch.labels, bias=leaves[2], beta=0.02, backend=backend, **ref
            )
            results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
    finally:
        rk.set_workspace_budget(None)
    torch.testing.assert_close(*(r[0] for r in results), rtol=1e-6, atol=1e-6)
    for small, large in zip(*(r[1:] for r in results), strict=True):
        assert T.relative_error(large, small) <= {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def test_equals_composing_the_two_public_functions(backend, device):
    batch = Batch(4, 17, 33, 129, device=device)
    ref_logps, pairs = batch.ref_logps(), halves(4, device)
    fused, composed = T.leaves_of(batch.leaves), T.leaves_of(batch.leaves)
    got = rk.linear_dpo_loss(fused[0], fused[1], batch.labels, ref_logps, bias=fused[2], beta=0.05, backend=backend)
    sums = rk.sequence_logprobs(composed[0], composed[1], batch.labels, composed[2], backend=backend)
    losses, rewards = rk.dpo_loss(sums.logprobs, ref_logps, *pairs, 0.05, backend=backend)
    torch.testing.assert_close(got.loss, losses.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.policy_logps, sums.logprobs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.chosen_rewards, rewards[pairs[0]], rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.loss, fused), torch.autograd.grad(losses.mean(), composed), strict=True):
        assert T.relative_error(a, b) < 3e-6


def test_a_fully_masked_response_gets_no_gradient(backend, device):
    """Its log-prob is 0, its padding may hold NaN, and the other response of its pair still learns."""
    batch = Batch(4, 9, 8, 33, device=device)
    batch.labels[2] = -100
    hidden = batch.hidden.clone()
    hidden[2] = math.nan
    leaves = T.leaves_of((hidden, batch.weight))
    out = rk.linear_dpo_loss(*leaves, batch.labels, torch.zeros(4, device=device), backend=backend)
    assert out.loss.isfinite() and out.policy_logps[2] == 0
    out.loss.backward()
    assert (leaves[0].grad[2] == 0).all() and (leaves[0].grad[0] != 0).any()
    assert leaves[0].grad.isfinite().all() and leaves[1].grad.isfinite().all()


@pytest.mark.parametrize("upstream", [0.0, -2.0, 65536.0])  # skipped; reversed; a loss scaler's
def test_upstream_scales_the_gradient(backend, device, upstream):
    batch = Batch(4, 9, 8, 33, device=device)
    grads = []
    for scale in (1.0, upstream):
        leaves = T.leaves_of((batch.hidden, batch.weight))
        loss = rk.linear_dpo_loss(*leaves, batch.labels, torch.zeros(4, device=device), backend=backend).loss
        grads.append(torch.autograd.grad(loss * scale, leaves))
    for one, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, one * upstream, rtol=1e-5, atol=1e-6 * abs(upstream))


@pytest.mark.parametrize("need", ["h", "w", "b", "hb", "hwb", ""])
def test_gradients_only_where_needed(backend, device, need):
    batch = Batch(4, 17, 33, 129, device=device)

    def grads(which):
        leaves = {k: t.detach().requires_grad_(k in which) for k, t in zip("hwb", batch.leaves, strict=True)}
        out = rk.linear_dpo_loss(
            leaves["h"], leaves["w"], batch.labels, torch.zeros(4, device=device), bias=leaves["b"], backend=backend
        )
        assert out.loss.requires_grad == bool(which)
        if which:
            out.loss.backward()
        return {k: leaves[k].grad for k in which}

    together = grads("hwb")
    for key, grad in grads(need).items():
        assert T.relative_error(grad, together[key]) < 1e-6


def test_the_reference_gets_no_gradient(backend, device):
    batch = Batch(4, 9, 8, 33, device=device)
    reference = {k: t.requires_grad_() for k, t in batch.ref_args().items()}
    loss = rk.linear_dpo_loss(
        batch.hidden.requires_grad_(), batch.weight, batch.labels, **reference, backend=backend
    ).loss
    loss.backward()
    assert batch.hidden.grad is not None and all(t.grad is None for t in reference.values())


def test_autocast(backend, device):
    batch = Batch(4, 17, 33, 129, device=device)
    leaves, rounded = T.leaves_of(batch.leaves), [t.bfloat16() for t in batch.leaves[:2]]
    exact = [*T.leaves_of(rounded, torch.float64), batch.bias.double().requires_grad_()]
    ref_logps = batch.ref_logps()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = rk.linear_dpo_loss(
            leaves[0], leaves[1], batch.labels, ref_logps, bias=leaves[2], beta=0.05, backend=backend
        )
    truth, *_ = plain_loss(
        exact, batch, ref_logps, halves(4, device), dtype=torch.float64, beta=0.05, loss_type="sigmoid"
    )
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-5)
    wants = torch.autograd.grad(truth, exact)
    for grad, want in zip(torch.autograd.grad(out.loss, leaves), wants, strict=True):
        assert grad.dtype == torch.float32 and T.relative_error(grad, want) < 4e-3
