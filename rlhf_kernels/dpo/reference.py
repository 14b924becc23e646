"""The pairwise losses of the DPO family in plain torch: pure functions of the pairs' log-ratios.

w and l [P] are the log-ratios of the chosen and of the rejected responses (beta w is DPO's implicit reward),

    w = log pi(y_w) - log pi_ref(y_w),     l = log pi(y_l) - log pi_ref(y_l),     h = w - l,

and every loss below is a function of them, of beta and of its own constants. Length-normalised types divide each
log-ratio by its response's number of tokens first; aot pairs the margins of the batch anew.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

DISCOPOP_TEMPERATURE = 0.05  # the paper's


class LossType(NamedTuple):
    """The needs and limits of a loss type; see `dpo_loss` for the table with sources."""

    reference_free: bool = False
    per_token: bool = False  # log-ratios divided by the response's tokens
    smoothing: bool = False  # label_smoothing may be > 0
    needs_smoothing: bool = False  # and must be
    positive_beta: bool = False  # undefined at beta = 0
    couples_pairs: bool = False  # a pair's loss depends on the other pairs
    kernel: int | None = None  # its number in csrc/preference/pair_losses.h; None: it has no one-launch kernel


LOSS_TYPES = {
    "sigmoid": LossType(smoothing=True, kernel=0),
    "hinge": LossType(kernel=1),
    "ipo": LossType(positive_beta=True, kernel=2),
    "ipo_mean": LossType(positive_beta=True, per_token=True),
    "robust": LossType(smoothing=True, kernel=3),
    "simpo": LossType(reference_free=True, per_token=True, smoothing=True),
    "apo_zero": LossType(),
    "apo_down": LossType(),
    "sppo": LossType(positive_beta=True),
    "nca": LossType(),
    "exo": LossType(smoothing=True, needs_smoothing=True),
    "aot": LossType(smoothing=True, couples_pairs=True),
    "discopop": LossType(),
}


class LossOptions(NamedTuple):
    """A loss type and its constants, as `dpo_loss` takes them."""

    loss_type: str
    beta: float
    label_smoothing: float
    gamma: float


def sigmoid(x: Tensor) -> Tensor:
    """torch.sigmoid, with a gradient that is right where the value rounds to 1: torch's, s (1 - s), is 0 from x = 17
    on in fp32, though the loss of a pair that is that wrong has a slope of 4e-8 and not none."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))


def log_ratios(policy: Tensor, ref: Tensor | None, token_counts: Tensor | None, kind: LossType) -> Tensor:
    """policy [S], ref [S], token_counts [S] -> log pi - log pi_ref [S], per token where the type says so."""
    ratios = policy if ref is None else policy - ref
    return ratios / token_counts.clamp(min=1) if kind.per_token and token_counts is not None else ratios


def of_equal_rank(margins: Tensor, others: Tensor) -> Tensor:
    """margins, others [P] -> for each margin the one of `others` that has its rank. Ties go by position."""
    rank = margins.detach().argsort(stable=True).argsort()
    return others.sort(stable=True).values.index_select(0, rank)


def pair_losses(won: Tensor, lost: Tensor, options: LossOptions) -> Tensor:
    """won [P], lost [P]: the log-ratios w and l -> losses [P]."""
    loss_type, beta, eps, gamma = options
    h = won - lost
    if loss_type == "simpo":  # Meng et al. (2024), eq. 6: the target margin is gamma in units of beta
        h = h - gamma
    if loss_type in ("sigmoid", "simpo", "aot"):  # Rafailov et al. (2023), eq. 7; eps: Mitchell (2023), cDPO, eq. 3
        return -(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)
    if loss_type == "hinge":  # Zhao et al. (2023), SLiC-HF, eq. 1 with margin 1; Liu et al. (2024), RSO, eq. 9
        return relu(1 - beta * h)
    if loss_type in ("ipo", "ipo_mean"):  # Azar et al. (2023), eq. 17, tau = beta
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "robust":  # Chowdhury et al. (2024), eq. 12, unbiased under labels flipped with probability eps
        return (-(1 - eps) * logsigmoid(beta * h) + eps * logsigmoid(-beta * h)) / (1 - 2 * eps)
    if loss_type == "apo_zero":  # D'Oosterlinck et al. (2024), eq. 7, with 1 - sigma(x) = sigma(-x)
        return sigmoid(-beta * won) + sigmoid(beta * lost)
    if loss_type == "apo_down":  # eq. 8 there
        return sigmoid(beta * won) + sigmoid(-beta * h)
    if loss_type == "sppo":  # Wu et al. (2024), eq. 4.7, eta = 1 / beta, winning probabilities 1 and 0
        return (won - 1 / (2 * beta)) ** 2 + (lost + 1 / (2 * beta)) ** 2
    if loss_type == "nca":  # Chen et al. (2024), NCA of a pair: K = 2, y_w has all the reward (alpha -> 0)
        return -logsigmoid(beta * won) - 0.5 * logsigmoid(-beta * won) - 0.5 * logsigmoid(-beta * lost)
    if loss_type == "exo":  # Ji et al. (2024), eq. 16, K = 2: KL of (sigma(x), sigma(-x)) from (1 - eps, eps)
        x = beta * h
        return sigmoid(x) * (logsigmoid(x) - math.log1p(-eps)) + sigmoid(-x) * (logsigmoid(-x) - math.log(eps))
    # discopop: Lu et al. (2024), eq. 5. The exponential part is one exponential: as a product, 0 times infinity.
    x = beta * h
    mix = x / DISCOPOP_TEMPERATURE
    return torch.exp(logsigmoid(mix) - x) - sigmoid(-mix) * logsigmoid(x)


def dpo_loss(
    policy: Tensor,
    ref: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """policy [S], ref [S], chosen [P], rejected [P] -> (losses [P], rewards [S] detached)."""
    kind = LOSS_TYPES[options.loss_type]
    ratios = log_ratios(policy, ref, token_counts, kind)
    if kind.couples_pairs and ref is not None:
        # Melnyk et al. (2024), AOT for pairs: h is the policy's margin less the reference's margin of the same rank.
        won, lost = (of.index_select(0, chosen) - of.index_select(0, rejected) for of in (policy, ref))
        lost = of_equal_rank(won, lost)
    else:
        won, lost = ratios.index_select(0, chosen), ratios.index_select(0, rejected)
    return pair_losses(won, lost, options), options.beta * ratios.detach()
