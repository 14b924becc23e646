"""The Bradley-Terry loss of reward modelling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_vectors, common_dtype
from .._dispatch import ready_for_native, resolve_backend
from . import ops, reference

__all__ = ["bradley_terry_loss"]


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Negative log-likelihood that the chosen response beats the rejected one.

        loss = -(1 - eps) log sigma(d) - eps log sigma(-d) + c (r_w + r_l)^2,     d = r_w - r_l - margin

    Args:
        chosen_rewards, rejected_rewards: r_w, r_l [P].
        margin: [P] or None: how much better the chosen one is rated. A constant; it gets no gradient.
        label_smoothing: eps in [0, 0.5): the probability that a label is wrong.
        center_coefficient: c >= 0 pulls the mean reward of a pair towards 0; 0.01 is usual.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        losses [P] fp32 (fp64 for fp64 inputs), nats.

    Raises:
        ValueError: shapes or devices that do not fit, eps or c out of range. TypeError: unsupported dtype.

    Source: Bradley & Terry (1952); Ouyang et al. (2022), arXiv:2203.02155, eq. 1; margin: Touvron et al. (2023),
    "Llama 2", arXiv:2307.09288, eq. 2; centring: Eisenstein et al. (2023), arXiv:2312.09244.
    """
    if margin is not None:
        margin = margin.detach()
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if not 0 <= center_coefficient < math.inf:
        raise ValueError(f"center_coefficient must be finite and >= 0, got {center_coefficient}")
    options = (float(label_smoothing), float(center_coefficient))
    if ready_for_native(backend, chosen_rewards, rejected_rewards, margin) and chosen_rewards.dim() == 1:
        return ops.bradley_terry_loss(chosen_rewards, rejected_rewards, margin, *options)
    check_vectors(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, margin=margin)
    dtype = common_dtype(chosen_rewards.dtype, rejected_rewards.dtype)
    chosen_backend = resolve_backend(backend, chosen_rewards.device, dtype)
    if chosen_backend == "triton":
        from . import triton_ops  # takes triton

        return triton_ops.bradley_terry_loss(chosen_rewards, rejected_rewards, margin, *options)
    if chosen_backend == "native":
        return ops.bradley_terry_loss(chosen_rewards, rejected_rewards, margin, *options)
    dtype = torch.promote_types(dtype, torch.float32)
    margin = None if margin is None else margin.to(dtype)
    return reference.bradley_terry_loss(chosen_rewards.to(dtype), rejected_rewards.to(dtype), margin, *options)
