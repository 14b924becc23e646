"""The loss of PPO's critic."""

from __future__ import annotations

import torch
from torch import Tensor

from .tokens import check_tokens, only_where


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    r"""Squared error of the values, which may gain nothing by moving far from what they were at sampling.

    With v' = clip(v, v_old - clip, v_old + clip) and R = returns:

        loss = 1/2 max((v - R)^2, (v' - R)^2)
        loss = 1/2 (v - R)^2                     with clip=None

    The gradient with respect to `values` is v - R, and exactly 0 where v' has the larger error: there v has passed its
    bound towards R. (Inside the bounds both errors are the same one, and the gradient is not halved.)

    Args:
        values: [B, T], the critic's; the gradient goes to these.
        old_values: [B, T], the critic's at sampling. No gradient; not read with clip=None.
        returns: [B, T], advantage + old value. No gradient.
        mask: [B, T] bool, True where the token counts. What stands elsewhere, NaN included, is not looked at.
        clip: >= 0 in the units of the values, or None.

    Returns:
        [B, T] per token, fp32 (fp64 for fp64 inputs), 0 where masked; average it over the tokens that count. In squared
        units of the values.

    Raises:
        ValueError: shapes or devices that do not fit, clip out of range.
        TypeError: unsupported dtype, `mask` not bool.

    Source: not in the PPO paper, but in its authors' code (OpenAI Baselines, ppo2), as Engstrom et al. (2020),
    "Implementation Matters in Deep Policy Gradients", arXiv:2005.12729, describe it.
    """
    dtype = check_tokens(mask, values=values, old_values=old_values, returns=returns)
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip must be >= 0 or None, got {clip}")
    values, returns = only_where(mask, values, dtype), only_where(mask, returns.detach(), dtype)
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error
    old = only_where(mask, old_values.detach(), dtype)
    clipped = (torch.clamp(values, old - clip, old + clip) - returns).square()
    return 0.5 * torch.where(clipped > error, clipped, error)
