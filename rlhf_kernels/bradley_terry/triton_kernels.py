"""bradley_terry_loss in Triton: one launch forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.launch import launch
from .._triton.pair_losses import SIGMOID, pair_loss
from .._triton.plan import VECTOR, cdiv


@triton.jit
def _pair(chosen, rejected, margin, i, inside, smoothing):
    """Loss and slope without centring, and the sum of the two rewards."""
    won = tl.load(chosen + i, mask=inside, other=0.0).to(tl.float32)
    lost = tl.load(rejected + i, mask=inside, other=0.0).to(tl.float32)
    d = won - lost
    if margin is not None:
        d -= tl.load(margin + i, mask=inside, other=0.0).to(tl.float32)
    loss, slope = pair_loss(d, 1.0, smoothing, SIGMOID)
    return loss, slope, won + lost


@triton.jit(do_not_specialize=["pairs"])
def reward_forward(
    chosen, rejected, margin, losses, pairs, smoothing, centring, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pairs
    loss, _, both = _pair(chosen, rejected, margin, i, inside, smoothing)
    if CENTRED:  # left out at 0: a squared reward may overflow, and 0 * inf is not 0
        loss += centring * both * both
    tl.store(losses + i, loss, mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def reward_backward(
    grad_losses, chosen, rejected, margin, grad_chosen, grad_rejected, pairs, smoothing, centring,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pairs
    _, slope, both = _pair(chosen, rejected, margin, i, inside, smoothing)
    grad = tl.load(grad_losses + i, mask=inside, other=0.0).to(tl.float32)
    slope_rejected = -slope
    if CENTRED:
        slope += 2.0 * centring * both
        slope_rejected += 2.0 * centring * both
    tl.store(grad_chosen + i, grad * slope, mask=inside)
    tl.store(grad_rejected + i, grad * slope_rejected, mask=inside)


def _inputs(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return chosen.contiguous(), rejected.contiguous(), None if margin is None else margin.contiguous()


def forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    """-> losses [P]"""
    pairs = chosen.shape[0]
    losses = chosen.new_empty(pairs, dtype=torch.float32)
    if pairs:
        launch(
            reward_forward, (cdiv(pairs, VECTOR),),
            *_inputs(chosen, rejected, margin), losses, pairs, label_smoothing, center_coefficient,
            CENTRED=center_coefficient != 0, BLOCK=VECTOR,
        )  # fmt: skip
    return losses


def backward(
    grad_losses: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float,
    center_coefficient: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of chosen and rejected [P]"""
    pairs = chosen.shape[0]
    grad_chosen, grad_rejected = (chosen.new_empty(pairs, dtype=torch.float32) for _ in range(2))
    if pairs:
        launch(
            reward_backward, (cdiv(pairs, VECTOR),),
            grad_losses.contiguous(), *_inputs(chosen, rejected, margin), grad_chosen, grad_rejected, pairs,
            label_smoothing, center_coefficient, CENTRED=center_coefficient != 0, BLOCK=VECTOR,
        )  # fmt: skip
    return grad_chosen, grad_rejected
