"""Binary classifier optimisation: single responses, each of them desirable or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .labelled import log_ratios


class BCOLoss(NamedTuple):
    """`losses` [S], and `rewards` [S] = beta * (log pi - log pi_ref), detached."""

    losses: Tensor
    rewards: Tensor


def bco_loss(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, reward_shift: Tensor, beta: float = 0.1
) -> BCOLoss:
    r"""Negative log-likelihood of a classifier of responses whose logit is the shifted reward.

    With r = beta (log pi - log pi_ref) and delta = reward_shift:

        loss = -log sigma(r - delta)    of a desirable response
        loss = -log sigma(delta - r)    of an undesirable one

    Of a desirable and an undesirable response to one prompt the two losses sum to at least their DPO loss, whatever
    delta is; the bound is closest where delta is half way between their rewards.

    Args:
        policy_logps, ref_logps: [S] sums of log-probabilities of the responses in nats.
        desirable: [S] bool.
        reward_shift: scalar delta, a reward (it has been multiplied by beta already): (mean of r over desirable + mean
            of r over undesirable) / 2, usually a moving average of `rewards` over the steps and all ranks. Its gradient
            is not taken.
        beta: >= 0. At 0 the losses are constants with zero gradient.

    Returns:
        BCOLoss(losses [S], rewards [S] detached), fp32 (fp64 for fp64 inputs), nats. The paper's matching of the two
        kinds' prompts is a weight of each undesirable response: multiply the losses by it.

    Raises:
        ValueError: shapes or devices that do not fit, beta out of range.
        TypeError: unsupported dtype, `desirable` not bool, `reward_shift` not a tensor.

    Source: Jung et al. (2024), "Binary Classifier Optimization", arXiv:2404.04656, the loss with reward shift.
    """
    ratios, shift = log_ratios(policy_logps, ref_logps, desirable, beta, "reward_shift", reward_shift)
    x = beta * ratios - shift
    return BCOLoss(-logsigmoid(torch.where(desirable, x, -x)), beta * ratios.detach())
