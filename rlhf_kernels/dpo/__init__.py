"""The DPO family: from per-response log-probabilities, or fused from hidden states."""

from .linear import LinearDPOLoss, linear_dpo_loss
from .pairwise import DPOLoss, dpo_loss

__all__ = ["DPOLoss", "LinearDPOLoss", "dpo_loss", "linear_dpo_loss"]
