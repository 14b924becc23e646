"""The DPO family: from per-response log-probabilities, or fused from hidden states."""

from .bco import BCOLoss, bco_loss
from .kto import KTOLoss, kto_loss
from .linear import LinearDPOLoss, linear_dpo_loss
from .orpo import ORPOLoss, orpo_loss
from .pairwise import DPOLoss, dpo_loss

__all__ = [
    "BCOLoss",
    "DPOLoss",
    "KTOLoss",
    "LinearDPOLoss",
    "ORPOLoss",
    "bco_loss",
    "dpo_loss",
    "kto_loss",
    "linear_dpo_loss",
    "orpo_loss",
]
