"""The Bradley-Terry loss in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    """chosen [P], rejected [P], margin [P] or None -> losses [P]."""
    d = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)
    # Left out at 0: a squared reward may overflow, and 0 * inf is not 0.
    return losses + center_coefficient * (chosen + rejected) ** 2 if center_coefficient else losses
