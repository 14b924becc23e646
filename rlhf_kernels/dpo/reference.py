"""The pairwise losses of the DPO family in plain torch: pure functions of the pairs' log-ratios.

h [P] is the difference of log-ratios of a pair (DPO's eq. 7 without beta),

    h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)),

and every loss below is a function of h, of beta and of its own constants. Length-normalised types divide each
log-ratio by its response's number of tokens first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid, relu


class LossType(NamedTuple):
    """What a loss type needs and allows; see `dpo_loss` for the table with sources."""

    reference_free: bool = False
    per_token: bool = False  # log-ratios divided by the response's tokens
    smoothing: bool = False  # label_smoothing may be > 0
    positive_beta: bool = False  # undefined at beta = 0
    compiled: bool = False  # has a one-launch kernel


LOSS_TYPES = {
    "sigmoid": LossType(smoothing=True, compiled=True),
    "hinge": LossType(compiled=True),
    "ipo": LossType(positive_beta=True, compiled=True),
    "ipo_mean": LossType(positive_beta=True, per_token=True),
    "robust": LossType(smoothing=True, compiled=True),
    "simpo": LossType(reference_free=True, per_token=True, smoothing=True),
}


def log_ratios(policy: Tensor, ref: Tensor | None, token_counts: Tensor | None, kind: LossType) -> Tensor:
    """policy [S], ref [S], token_counts [S] -> log pi - log pi_ref [S], per token where the type says so."""
    ratios = policy if ref is None else policy - ref
    return ratios / token_counts.clamp(min=1) if kind.per_token and token_counts is not None else ratios


def pair_losses(h: Tensor, beta: float, loss_type: str, label_smoothing: float, gamma: float) -> Tensor:
    """h [P] -> losses [P]."""
    eps = label_smoothing
    if loss_type == "simpo":  # Meng et al. (2024), eq. 6: the target margin is gamma in units of beta
        h = h - gamma
    if loss_type in ("sigmoid", "simpo"):  # Rafailov et al. (2023), eq. 7; smoothed: Mitchell (2023), cDPO, eq. 3
        return -(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)
    if loss_type == "hinge":  # Zhao et al. (2023), SLiC-HF, eq. 1 with margin 1; Liu et al. (2024), RSO, eq. 9
        return relu(1 - beta * h)
    if loss_type in ("ipo", "ipo_mean"):  # Azar et al. (2023), eq. 17, tau = beta
        return (h - 1 / (2 * beta)) ** 2
    # robust: Chowdhury et al. (2024), eq. 12, unbiased under labels flipped with probability eps
    return (-(1 - eps) * logsigmoid(beta * h) + eps * logsigmoid(-beta * h)) / (1 - 2 * eps)


def dpo_loss(
    policy: Tensor,
    ref: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    token_counts: Tensor | None,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """policy [S], ref [S], chosen [P], rejected [P] -> (losses [P], rewards [S] detached)."""
    ratios = log_ratios(policy, ref, token_counts, LOSS_TYPES[loss_type])
    h = ratios.index_select(0, chosen) - ratios.index_select(0, rejected)
    return pair_losses(h, beta, loss_type, label_smoothing, gamma), beta * ratios.detach()
