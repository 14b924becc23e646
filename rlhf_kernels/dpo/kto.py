"""Kahneman-Tversky optimisation: single responses, each of them desirable or not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .labelled import log_ratios
from .reference import sigmoid


class KTOLoss(NamedTuple):
    """`losses` [S], and `rewards` [S] = beta * (log pi - log pi_ref), detached."""

    losses: Tensor
    rewards: Tensor


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    r"""How far each response is from the value it could have, its reward being judged against the policy's drift.

    With r = log pi - log pi_ref and z = max(kl, 0):

        loss = desirable_weight (1 - sigma(beta (r - z)))      of a desirable response
        loss = undesirable_weight (1 - sigma(beta (z - r)))    of an undesirable one

    Args:
        policy_logps, ref_logps: [S] sums of log-probabilities of the responses in nats.
        desirable: [S] bool.
        kl: scalar, an estimate of KL(policy || ref) in nats, the same for the whole batch. Its gradient is not taken.
            The paper's is the mean of log pi - log pi_ref over pairs of a prompt with another prompt's response; make
            it over all ranks.
        beta: >= 0. At 0 the losses are half their weights, with zero gradient.
        desirable_weight, undesirable_weight: >= 0, the paper's lambda_D and lambda_U; they balance unequal numbers of
            both kinds.

    Returns:
        KTOLoss(losses [S], rewards [S] detached), fp32 (fp64 for fp64 inputs). The losses lie between 0 and their
        weight; they are values, not nats.

    Raises:
        ValueError: shapes or devices that do not fit, constants out of range.
        TypeError: unsupported dtype, `desirable` not bool, `kl` not a tensor.

    Source: Ethayarajh et al. (2024), "KTO", arXiv:2402.01306, eq. 8, lambda_y left out, as it is a constant.
    """
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {weight}")
    ratios, kl = log_ratios(policy_logps, ref_logps, desirable, beta, "kl", kl)
    x = beta * (ratios - kl.clamp(min=0))
    losses = torch.where(desirable, desirable_weight * sigmoid(-x), undesirable_weight * sigmoid(x))
    return KTOLoss(losses, beta * ratios.detach())
