"""dpo_loss in Triton: one launch forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import launch
from .._triton.pair_losses import pair_loss
from .._triton.plan import VECTOR, cdiv


@triton.jit
def _log_ratio(policy, ref, i, inside):
    value = tl.load(policy + i, mask=inside, other=0.0).to(tl.float32)
    if ref is not None:
        value -= tl.load(ref + i, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _pair_losses(policy, ref, won, lost, responses, inside, beta, smoothing, TYPE: tl.constexpr):
    """Loss and slope of the pairs (won, lost); NaN where an index is outside."""
    valid = inside & (won >= 0) & (won < responses) & (lost >= 0) & (lost < responses)
    h = _log_ratio(policy, ref, won, valid) - _log_ratio(policy, ref, lost, valid)
    return pair_loss(tl.where(valid, h, float("nan")), beta, smoothing, TYPE)


@triton.jit(do_not_specialize=["pairs", "responses"])
def pair_forward(
    policy, ref, chosen, rejected, losses, rewards, pairs, responses, beta, smoothing,
    TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pairs
    won = tl.load(chosen + i, mask=inside, other=0)
    lost = tl.load(rejected + i, mask=inside, other=0)
    loss, _ = _pair_losses(policy, ref, won, lost, responses, inside, beta, smoothing, TYPE)
    tl.store(losses + i, loss, mask=inside)
    tl.store(rewards + i, beta * _log_ratio(policy, ref, i, i < responses), mask=i < responses)


@triton.jit(do_not_specialize=["pairs", "responses"])
def pair_backward(
    policy, ref, chosen, rejected, grad_losses, grad, pairs, responses, beta, smoothing,
    TYPE: tl.constexpr, RESPONSES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """RESPONSES responses go over all pairs, PAIRS at a time: a response's terms are added in a fixed order."""
    response = tl.cast(tl.program_id(0), tl.int64) * RESPONSES + tl.arange(0, RESPONSES)
    total = tl.zeros([RESPONSES], tl.float32)
    for first in range(0, pairs, PAIRS):
        i = first + tl.arange(0, PAIRS)
        inside = i < pairs
        won = tl.load(chosen + i, mask=inside, other=-1)
        lost = tl.load(rejected + i, mask=inside, other=-1)
        _, slope = _pair_losses(policy, ref, won, lost, responses, inside, beta, smoothing, TYPE)
        term = tl.load(grad_losses + i, mask=inside, other=0.0).to(tl.float32) * slope
        as_chosen = (response[:, None] == won[None, :]) & inside[None, :]
        as_rejected = (response[:, None] == lost[None, :]) & inside[None, :]
        total += tl.sum(tl.where(as_chosen, term[None, :], 0.0) - tl.where(as_rejected, term[None, :], 0.0), 1)
    tl.store(grad + response, total, mask=response < responses)


def forward(
    policy: Tensor, ref: Tensor | None, chosen: Tensor, rejected: Tensor, beta: float, loss_type: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """-> losses [P], rewards [S]"""
    pairs, responses = chosen.shape[0], policy.shape[0]
    losses = policy.new_empty(pairs, dtype=torch.float32)
    rewards = policy.new_empty(responses, dtype=torch.float32)
    if pairs + responses:
        launch(
            pair_forward, (cdiv(pairs + responses, VECTOR),),  # enough for either
            policy.contiguous(), None if ref is None else ref.contiguous(), chosen.contiguous(), rejected.contiguous(),
            losses, rewards, pairs, responses, beta, smoothing, TYPE=loss_type, BLOCK=VECTOR,
        )  # fmt: skip
    return losses, rewards


def backward(
    grad_losses: Tensor, policy: Tensor, ref: Tensor | None, chosen: Tensor, rejected: Tensor, beta: float,
    loss_type: int, smoothing: float,
) -> Tensor:  # fmt: skip
    """-> gradient of policy [S]"""
    pairs, responses, block = chosen.shape[0], policy.shape[0], 32
    grad = policy.new_empty(responses, dtype=torch.float32)
    if responses:
        launch(
            pair_backward, (cdiv(responses, block),),
            policy.contiguous(), None if ref is None else ref.contiguous(), chosen.contiguous(), rejected.contiguous(),
            grad_losses.contiguous(), grad, pairs, responses, beta, smoothing, TYPE=loss_type, RESPONSES=block,
            PAIRS=block,
        )  # fmt: skip
    return grad
