"""Proximal policy optimisation: the clipped objective per token, and how much of it is clipped."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_floating, check_same_device
from .tokens import check_tokens, clipped_objective, log_clip_range


class ClipFraction(NamedTuple):
    """Shares of the counted tokens, scalars: `low` of those held up from below, `high` of those held down."""

    low: Tensor
    high: Tensor


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Raises the probability of tokens that were better than expected, up to a bound, and lowers that of the others.

    With r = exp(logprobs - old_logprobs) and A = advantages:

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        loss = min(that, -dual_clip A)    where A < 0 and dual_clip is not None

    The gradient with respect to `logprobs` is -r A where the ratio is free (at r = 1 that is the policy gradient), and
    exactly 0 where the bound has been passed in the direction of A.

    Args:
        logprobs: [B, T] log-probabilities of the sampled tokens in nats; the gradient goes to these.
        old_logprobs: [B, T] of the policy that sampled, or that the epochs over a batch began with. No gradient.
        advantages: [B, T]. No gradient.
        mask: [B, T] bool, True where the token counts. What stands elsewhere, NaN included, is not looked at.
        clip_low, clip_high: epsilon on either side; clip_low in [0, 1], clip_high >= 0. 1 and infinity do not clip.
        dual_clip: > 1, the most that a ratio counts for where A < 0, or None.
        weights: [B, T], >= 0, that multiply the loss, such as `importance_weights`, or None. No gradient.

    Returns:
        [B, T] per token, fp32 (fp64 for fp64 inputs), 0 where masked; average it over the tokens that count. In the
        units of the advantages. Without dual_clip nothing bounds r where A < 0: beyond log r = 88 loss and gradient are
        infinite (in fp32), and never NaN.

    Raises:
        ValueError: shapes or devices that do not fit, constants out of range.
        TypeError: unsupported dtype, `mask` not bool.

    Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 7, epsilon apart
    for both sides as in DAPO (arXiv:2503.14476); dual_clip: Ye et al. (2019), "Mastering Complex Control in MOBA Games
    with Deep Reinforcement Learning", arXiv:1912.09729.
    """
    dtype = check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_tokens(mask, logprobs=logprobs, weights=weights)
    log_low, log_high = log_clip_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, got {dual_clip}")
    log_weights = None
    if weights is not None:
        mask = mask & (weights != 0)
        log_weights = torch.where(mask, weights.detach().to(dtype), 1.0).log()
    return clipped_objective(
        logprobs.to(dtype) - old_logprobs.detach().to(dtype), advantages.detach().to(dtype), mask, log_low, log_high,
        log_most=math.inf if dual_clip is None else math.log(dual_clip), log_weights=log_weights,
    )  # fmt: skip


def clip_fraction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> ClipFraction:
    r"""How many of the counted tokens have a ratio at which `ppo_loss` gives them no gradient.

        low   share with r < 1 - clip_low and A < 0
        high  share with r > 1 + clip_high and A > 0

    Args:
        logprobs, old_logprobs: [B, T] in nats. For ratios of sequences, [B, 1]: the mean (gspo) or the sum (rloo) over
            each one's tokens; the shares are then of sequences.
        advantages: [B, T], or [B] for one a sequence.
        mask: [B, T] bool.
        clip_low, clip_high: as for the loss.

    Returns:
        ClipFraction(low, high), scalars, fp32 (fp64 for fp64 log-probabilities), without gradient. 0 if none counts.

    Raises:
        ValueError: shapes or devices that do not fit, constants out of range.
        TypeError: unsupported dtype, `mask` not bool.
    """
    dtype = check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_low, log_high = log_clip_range(clip_low, clip_high)
    check_floating(advantages=advantages)
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"advantages must be {tuple(mask.shape)} or [{mask.shape[0]}], got {tuple(advantages.shape)}")
    check_same_device(logprobs=logprobs, advantages=advantages)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    log_ratios = logprobs.detach().to(dtype) - old_logprobs.detach().to(dtype)
    total = mask.sum().clamp(min=1)
    low = (mask & (log_ratios < log_low) & (advantages < 0)).sum().to(dtype) / total
    high = (mask & (log_ratios > log_high) & (advantages > 0)).sum().to(dtype) / total
    return ClipFraction(low, high)
