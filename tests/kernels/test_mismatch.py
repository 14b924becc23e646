"""importance_weights and off_policy_mask against their plain statements, and the losses that take the weights."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOW, HIGH = 0.7, 1.4


def make(device, dtype=torch.float64, b=7, t=6):
    """logprobs, sampler_logprobs [B, T], advantages [B], mask [B, T]; one row has no token."""
    old = -T.randn(b, t, seed=1, dtype=dtype, device=device).abs()
    sampler = old + 0.3 * T.randn(b, t, seed=2, dtype=dtype, device=device)
    mask = (torch.rand(b, t, generator=torch.Generator().manual_seed(3)) < 0.7).to(device)
    mask[1] = False
    return old, sampler, T.randn(b, seed=4, dtype=dtype, device=device), mask


def plain(old, sampler, mask, mode, low, high):
    """Token by token."""
    want = torch.zeros_like(old)
    for b in range(len(old)):
        places = mask[b].nonzero().flatten().tolist()
        logs = {t: 0.0 if sampler[b, t].isnan() else (old[b, t] - sampler[b, t]).item() for t in places}
        for t in places:
            w = math.exp(sum(logs.values()) if mode.startswith("sequence") else logs[t])
            inside = low <= w <= high
            want[b, t] = min(max(w, low), high) if mode.endswith("truncate") else w * inside
    return want


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(LOW, HIGH), (0.0, HIGH), (LOW, math.inf), (0.0, math.inf)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights(device, mode, bounds, dtype):
    old, sampler, _, mask = make(device, dtype)
    sampler[0, mask[0].nonzero()[0]] = math.nan  # the sampler does not know that one
    old[~mask], sampler[~mask] = math.nan, math.inf
    got = rk.importance_weights(old.requires_grad_(), sampler, mask, mode, clip_min=bounds[0], clip_max=bounds[1])
    assert got.dtype == (dtype if dtype == torch.float64 else torch.float32) and not got.requires_grad
    want = plain(old.detach().double(), sampler.double(), mask, mode, *bounds)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    if bounds == (LOW, HIGH):  # the bounds are met from both sides
        assert ((want == 0) & mask).any() if mode.endswith("mask") else {LOW, HIGH} < set(want.flatten().tolist())


def test_off_policy_mask(device):
    old, sampler, advantages, mask = make(device)
    gaps = [(sampler[b] - old[b])[mask[b]].mean().item() if mask[b].any() else 0.0 for b in range(len(old))]
    threshold = min(gap for gap in gaps if gap > 0) + 1e-9
    keep = [a >= 0 or gap <= threshold for a, gap in zip(advantages.tolist(), gaps, strict=True)]
    assert {True, False} == set(keep)
    want = torch.tensor(keep, device=device)[:, None] & mask
    assert torch.equal(rk.off_policy_mask(old, sampler, advantages, mask, threshold), want)
    of_tokens = advantages[:, None].expand_as(mask)
    assert torch.equal(rk.off_policy_mask(old, sampler, of_tokens, mask, threshold), want)
    sampler[mask] = math.nan  # no evidence against any
    assert torch.equal(rk.off_policy_mask(old, sampler, advantages, mask, threshold), mask)


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "sapo"])
def test_grpo_loss_takes_weights(device, variant):
    """Of tokens: the loss of each token alone, times its weight. Of sequences: their mean. A weight of 0 leaves nothing
    of a ratio without bounds."""
    old, sampler, advantages, mask = make(device)
    new = (old + 0.2 * T.randn(*old.shape, seed=5, dtype=old.dtype, device=device)).requires_grad_()
    weights = rk.importance_weights(old, sampler, mask, "token_mask", clip_min=LOW, clip_max=HIGH)
    of_sequence = variant in ("gspo", "rloo")
    options = {"variant": variant, "max_length": 9}

    def loss(a, counted=mask, **more):
        return rk.grpo_loss(new, old, a, counted, **options, **more)

    got = loss(advantages, weights=weights)
    if of_sequence:
        want = loss(advantages * weights.sum(1) / mask.sum(1).clamp(min=1))
    else:  # linear in the terms: one token at a time has the others' weight 0
        want = 0.0
        for t in range(mask.shape[1]):
            only = torch.zeros_like(weights)
            only[:, t] = 1.0
            want = want + (loss(advantages * weights[:, t], weights=only))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x, new, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    extreme = torch.where(mask, 1e4, 0.0).double().requires_grad_()
    nothing = rk.grpo_loss(extreme, old, -advantages.abs(), mask, weights=torch.zeros_like(weights), **options)
    assert nothing == 0 and (torch.autograd.grad(nothing, extreme)[0] == 0).all()
    assert torch.equal(loss(advantages, weights=torch.ones_like(weights)), loss(advantages))


def test_ppo_loss_takes_weights(device):
    old, sampler, advantages, mask = make(device)
    new = (old + 0.2 * T.randn(*old.shape, seed=5, dtype=old.dtype, device=device)).requires_grad_()
    weights = rk.importance_weights(old, sampler, mask, "token_mask", clip_min=LOW, clip_max=HIGH)
    of_tokens = advantages[:, None].expand_as(mask)
    got, free = rk.ppo_loss(new, old, of_tokens, mask, weights=weights), rk.ppo_loss(new, old, of_tokens, mask)
    torch.testing.assert_close(got, free * weights, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), new)[0] for x in (got, free * weights)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    spoilt = torch.where(mask, weights, math.nan)
    assert torch.equal(rk.ppo_loss(new, old, of_tokens, mask, weights=spoilt), got)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [1e4, -1e4, 100.0])
def test_sapo_stays_finite(device, ratio, advantage):
    x = torch.tensor([[ratio]], device=device, requires_grad=True)
    mask, tau = torch.ones(1, 1, dtype=torch.bool, device=device), 1.0 if advantage > 0 else 1.05
    loss = rk.grpo_loss(x, torch.zeros_like(x), torch.tensor([advantage], device=device), mask, variant="sapo")
    gate = 1.0 if ratio > 0 else 1 / (1 + math.exp(tau))
    assert loss.item() == pytest.approx(-advantage * gate * 4 / tau, rel=1e-6)
    assert torch.autograd.grad(loss, x)[0].item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "token"}, "mode"),
        ({"clip_min": 2.0, "clip_max": 1.0}, "expected 0 <= clip_min <= clip_max, got 2.0 and 1.0"),
        ({"clip_min": -1.0}, "expected 0 <= clip_min"),
    ],
)
def test_wrong_options_of_weights(device, options, message):
    old, sampler, _, mask = make(device)
    with pytest.raises(ValueError, match=message):
        rk.importance_weights(old, sampler, mask, **options)


def test_wrong_use(device):
    old, sampler, advantages, mask = make(device)
    with pytest.raises(ValueError, match="threshold must be > 0, got 0"):
        rk.off_policy_mask(old, sampler, advantages, mask, 0)
    with pytest.raises(ValueError, match=r"advantages must be \(7, 6\) or \[7\], got \(6,\)"):
        rk.off_policy_mask(old, sampler, advantages[1:], mask, 0.5)
    with pytest.raises(ValueError, match=r"weights must be \(7, 6\) like logprobs, got \(7,\)"):
        rk.grpo_loss(old, old, advantages, mask, weights=advantages)
    for options in ({"dual_clip": 1.0}, {"dual_clip": 2.0, "variant": "sapo"}):
        with pytest.raises(ValueError, match="dual_clip must be > 1, and not with variant"):
            rk.grpo_loss(old, old, advantages, mask, **options)
    with pytest.raises(ValueError, match="sapo_temperatures must be > 0"):
        rk.grpo_loss(old, old, advantages, mask, sapo_temperatures=(0.0, 1.0))
