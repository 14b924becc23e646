"""Odds-ratio preference optimisation: one loss that fine-tunes and prefers, without a reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._checks import check_same_device, check_vectors
from .pairwise import check_pairs, check_range


class ORPOLoss(NamedTuple):
    """`losses` [P]; without gradient `nll` [P], `log_odds` [P] (of the odds ratio) and `rewards` [S]."""

    losses: Tensor
    nll: Tensor
    log_odds: Tensor
    rewards: Tensor


def orpo_loss(
    policy_logps: Tensor, token_counts: Tensor, chosen_idxs: Tensor, rejected_idxs: Tensor, beta: float = 0.1
) -> ORPOLoss:
    r"""Fine-tunes on the chosen responses and raises their odds over those of the rejected ones.

    With m = log pi / tokens, the mean log-probability of a response's tokens, and p = e^m:

        loss = -m(chosen) - beta log sigma(log_odds)
        log_odds = log(p / (1 - p))(chosen) - log(p / (1 - p))(rejected)

    1 - p comes from expm1, so it does not cancel next to p = 1. Where p rounds to 1 (or is more, which no probability
    is) the odds are those of 1 - eps, eps the dtype's, with the slope they have there.

    Args:
        policy_logps: [S] sums of log-probabilities of the responses' tokens in nats, e.g. from `sequence_logprobs`.
        token_counts: [S] number of tokens of each; an empty response counts as one token of probability 1.
        chosen_idxs, rejected_idxs: [P] int64 into [0, S). One response may serve in many pairs.
        beta: >= 0, the weight of the odds-ratio term (the paper's lambda). 0 is fine-tuning on the chosen responses.

    Returns:
        ORPOLoss(losses [P], nll [P] = -m(chosen), log_odds [P], rewards [S] = beta m), nats; all but the losses
        detached. fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or devices that do not fit, beta out of range. TypeError: unsupported dtype.
        IndexError: an index outside [0, S).

    Source: Hong, Lee & Thorne (2024), "ORPO", arXiv:2403.07691, eq. 6 and 7.
    """
    size = check_vectors(policy_logps=policy_logps)
    if token_counts.dtype == torch.bool or token_counts.is_complex():
        raise TypeError(f"token_counts must be integers or floats, got {token_counts.dtype}")
    if token_counts.shape != policy_logps.shape:
        raise ValueError(f"token_counts must be [{size}], got {tuple(token_counts.shape)}")
    check_pairs(chosen_idxs, rejected_idxs)
    check_range(chosen_idxs, rejected_idxs, size)
    check_same_device(
        policy_logps=policy_logps, token_counts=token_counts, chosen_idxs=chosen_idxs, rejected_idxs=rejected_idxs
    )
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0, got {beta}")

    policy_logps = policy_logps.to(torch.promote_types(policy_logps.dtype, torch.float32))
    means = policy_logps / token_counts.clamp(min=1).to(policy_logps.dtype)
    odds = _log_odds(means)
    nll = -means.index_select(0, chosen_idxs)
    log_odds = odds.index_select(0, chosen_idxs) - odds.index_select(0, rejected_idxs)
    return ORPOLoss(nll - beta * logsigmoid(log_odds), nll.detach(), log_odds.detach(), beta * means.detach())


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^logp."""
    eps = torch.finfo(logp.dtype).eps
    logp = torch.where(logp < -eps, logp, logp - logp.detach() - eps)  # the value -eps, the slope kept
    # 1 - p is -expm1(log p). Far below 0 its logarithm loses its digits (log1p(-p) would keep them), but there it is
    # nothing beside log p.
    return logp - torch.log(-torch.expm1(logp))
