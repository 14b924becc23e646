"""Tokens of all losses of this room: their checks, the mask, and the clipped objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_floating, check_same_device


def check_tokens(mask: Tensor, **tensors: Tensor | None) -> torch.dtype:
    """The first tensor sets [B, T], the others are like it -> the dtype to compute in, fp32 or fp64."""
    name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    check_floating(**tensors)
    if first.dim() != 2:
        raise ValueError(f"{name} must be [B, T], got {tuple(first.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    for other, tensor in (*tensors.items(), ("mask", mask)):
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(f"{other} must be {tuple(first.shape)} like {name}, got {tuple(tensor.shape)}")
    check_same_device(**tensors, mask=mask)
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def only_where(mask: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where masked: what stands there, NaN too, reaches neither the value nor the gradient."""
    return torch.where(mask, tensor.to(dtype), 0.0)


def log_clip_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The logarithms of 1 - clip_low and 1 + clip_high, after their checks."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], where 1 does not clip, got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0 (infinity does not clip), got {clip_high}")
    return (-math.inf if clip_low == 1 else math.log(1 - clip_low)), math.log(1 + clip_high)


def clipped_objective(
    log_ratios: Tensor,
    advantages: Tensor,
    counted: Tensor,
    log_low: float,
    log_high: float,
    *,
    log_most: float = math.inf,
    log_weights: Tensor | None = None,
) -> Tensor:
    r"""-max(min(r A, clip(r, low, high) A), most A where A < 0), times the weights; all of one shape, exactly 0 where
    not counted.

    The minimum bounds r from above where A > 0 and from below where A < 0, so it is -A times one bounded ratio. The
    bounds are put on log r: no ratio overflows that the minimum would not have chosen, and no branch that was not taken
    can send back 0 times infinity. A bounded ratio has gradient 0, any other that of r A: nothing is shared out at the
    ties, r = 1 among them. Weights, which have no gradient, are added to the logarithm for the same reason.
    """
    counted = counted & (advantages != 0)  # A = 0 leaves nothing of any ratio, an infinite one neither
    log_ratios, advantages = torch.where(counted, log_ratios, 0.0), torch.where(counted, advantages, 0.0)
    unbounded = torch.full_like(advantages, math.inf)
    least = torch.where(advantages < 0, log_low, -unbounded)
    most = torch.where(advantages > 0, log_high, torch.full_like(advantages, log_most))
    exponents = torch.clamp(log_ratios, least, most)
    if log_weights is not None:
        exponents = exponents + torch.where(counted, log_weights, 0.0)
    return -advantages * exponents.exp()
