"""grpo_clip_fraction: the share of what a variant clips that its loss gives no gradient, or a bounded weight."""

import math

import pytest
import torch

import rlhf_kernels as rk


@pytest.fixture
def tokens():
    """logprobs [6, 5] and what they are compared with; rows of 5 to 0 tokens, NaN behind them."""
    torch.manual_seed(3)
    mask = torch.arange(5) < torch.tensor([5, 4, 5, 3, 2, 0])[:, None]
    logprobs, old = (-torch.rand(2, 6, 5, dtype=torch.float64)).masked_fill(~mask, math.nan)
    return logprobs, old, torch.tensor([1.0, -1.0, -0.5, 2.0, 0.0, 1.0], dtype=torch.float64), mask


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_what_is_clipped_has_no_gradient(tokens, variant):
    logprobs, old, advantages, mask = tokens
    leaf = logprobs.clone().requires_grad_()
    rk.grpo_loss(leaf, old, advantages, mask, variant=variant, clip_low=0.05, clip_high=0.1, max_length=5).backward()
    without = (leaf.grad == 0) & mask & (advantages != 0)[:, None]
    low, high = rk.grpo_clip_fraction(logprobs, old, advantages, mask, variant, 0.05, 0.1)
    if variant in ("gspo", "rloo"):
        expected = without.any(1).sum() / 5  # of the five sequences that have tokens
    else:
        expected = without.sum() / mask.sum()
    assert low + high == pytest.approx(expected.item()) and low > 0 and high > 0


def test_cispo_bounds_both_sides_and_reinforce_none(tokens):
    logprobs, old, advantages, mask = tokens
    ratio = (logprobs - old).exp()[mask]
    low, high = rk.grpo_clip_fraction(logprobs, old, advantages, mask, "cispo", 0.05, 0.1)
    assert low == (ratio < 0.95).double().mean() and high == (ratio > 1.1).double().mean()
    assert rk.grpo_clip_fraction(logprobs, old, advantages, mask, "reinforce") == (0, 0)
