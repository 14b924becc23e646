"""A sampler that is not quite the policy: another engine, another precision, an older policy. Weights correct it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_choice
from .tokens import check_tokens, only_where

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    mode: str = "token_truncate",
    *,
    clip_min: float = 0.0,
    clip_max: float = math.inf,
) -> Tensor:
    r"""Importance weights w = pi / mu of tokens that a sampler mu drew, for the losses of a policy pi that learns.

        token_...      w_t = exp(logprobs_t - sampler_logprobs_t)
        sequence_...   w_t = exp(sum over the sequence's tokens of logprobs - sampler_logprobs), the same for all t
        ..._truncate   min(max(w, clip_min), clip_max)
        ..._mask       w where clip_min <= w <= clip_max, else 0

    Args:
        logprobs: [B, T] nats, of the policy as it was before the update (`old_logprobs` of the losses).
        sampler_logprobs: [B, T] nats, as the sampler drew; NaN where it has none: that token's ratio is 1.
        mask: [B, T] bool, True where the token counts. mode: see above, TRL's names.
        clip_min, clip_max: 0 <= clip_min <= clip_max; with "..._truncate" and infinity a weight may be infinite.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs), 0 where masked, without gradient.

    Raises:
        ValueError: shapes or devices that do not fit, unknown mode, bounds out of order.
        TypeError: unsupported dtype, `mask` not bool.

    Source: truncated: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training";
    masked, and of sequences: Liu et al. (2025), "When Speed Kills Stability: Demystifying RL Collapse from the
    Training-Inference Mismatch".
    """
    check_choice("mode", mode, MODES)
    if not 0 <= clip_min <= clip_max:
        raise ValueError(f"expected 0 <= clip_min <= clip_max, got {clip_min} and {clip_max}")
    logs = _log_ratios(logprobs, sampler_logprobs, mask)
    if mode.startswith("sequence"):
        logs = logs.sum(-1, keepdim=True).expand_as(mask)
    weights = logs.exp()
    if mode.endswith("truncate"):
        return only_where(mask, weights.clamp(clip_min, clip_max), weights.dtype)
    return only_where(mask & (weights >= clip_min) & (weights <= clip_max), weights, weights.dtype)


def off_policy_mask(
    logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    r"""What is worth learning from: all that was better than expected, and of the rest sequences near the policy.

        keep = A >= 0  or  1/n sum over the sequence's n tokens of (sampler_logprobs - logprobs) <= threshold

    Args:
        logprobs, sampler_logprobs, mask: as for `importance_weights`, but the policy's as it is now.
        advantages: [B], or [B, T]. threshold: > 0, nats a token.

    Returns:
        [B, T] bool, False where masked.

    Raises: as `importance_weights`.

    Source: DeepSeek-AI (2025), "DeepSeek-V3.2", arXiv:2512.02556, eq. 9.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0, got {threshold}")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"advantages must be {tuple(mask.shape)} or [{mask.shape[0]}], got {tuple(advantages.shape)}")
    logs = _log_ratios(logprobs, sampler_logprobs, mask)
    near = -logs.sum(-1, keepdim=True) <= threshold * mask.sum(-1, keepdim=True)
    return mask & (near | (advantages if advantages.dim() == 2 else advantages[:, None]).ge(0))


def _log_ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T], 0 where masked, and where the sampler has no log-prob."""
    dtype = check_tokens(mask, logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    known = mask & ~sampler_logprobs.isnan()
    return torch.where(known, logprobs.detach().to(dtype) - sampler_logprobs.detach().to(dtype), 0.0)
