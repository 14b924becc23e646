"""The checks and log-ratios of losses of single responses, each of which is desirable or not: no pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_floating, check_same_device, check_vectors


def log_ratios(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, beta: float, name: str, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Checks all arguments -> log pi - log pi_ref [S], and the scalar `value` detached, in fp32 or fp64."""
    size = check_vectors(policy_logps=policy_logps, ref_logps=ref_logps)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}")
    if desirable.shape != policy_logps.shape:
        raise ValueError(f"desirable must be [{size}], got {tuple(desirable.shape)}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a scalar Tensor, got {type(value).__name__}")
    check_floating(**{name: value})
    if value.dim() != 0:
        raise ValueError(f"{name} must be a scalar Tensor, got shape {tuple(value.shape)}")
    check_same_device(policy_logps=policy_logps, ref_logps=ref_logps, desirable=desirable, **{name: value})
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0, got {beta}")
    dtype = torch.promote_types(torch.promote_types(policy_logps.dtype, ref_logps.dtype), torch.float32)
    return policy_logps.to(dtype) - ref_logps.to(dtype), value.detach().to(dtype)
