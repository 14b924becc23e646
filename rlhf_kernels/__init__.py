"""Losses of RLHF from hidden states, without the `[tokens, vocab]` matrix. Every public name is listed here."""

from ._build_info import __version__ as __version__
from ._build_info import build_info
from ._dispatch import available_backends
from ._workspace import set_workspace_budget
from .bradley_terry import bradley_terry_loss
from .dpo import (
    BCOLoss,
    DPOLoss,
    KTOLoss,
    LinearDPOLoss,
    ORPOLoss,
    bco_loss,
    dpo_loss,
    kto_loss,
    linear_dpo_loss,
    orpo_loss,
)
from .kl import kl_penalty, linear_kl
from .logprob import LinearLogprobs, SequenceLogprobs, linear_logprobs, sequence_logprobs
from .policy_gradient import (
    ClipFraction,
    clip_fraction,
    grpo_clip_fraction,
    grpo_loss,
    grpo_loss_weights,
    importance_weights,
    off_policy_mask,
    ppo_loss,
    value_loss,
)

__all__ = [
    "BCOLoss",
    "ClipFraction",
    "DPOLoss",
    "KTOLoss",
    "LinearDPOLoss",
    "LinearLogprobs",
    "ORPOLoss",
    "SequenceLogprobs",
    "available_backends",
    "bco_loss",
    "bradley_terry_loss",
    "build_info",
    "clip_fraction",
    "dpo_loss",
    "grpo_clip_fraction",
    "grpo_loss",
    "grpo_loss_weights",
    "importance_weights",
    "kl_penalty",
    "kto_loss",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logprobs",
    "off_policy_mask",
    "orpo_loss",
    "ppo_loss",
    "sequence_logprobs",
    "set_workspace_budget",
    "value_loss",
]
