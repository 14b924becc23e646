"""Policy gradients of reinforcement learning, from log-probabilities of sampled tokens: PPO, its values, and GRPO."""

from .grpo import grpo_clip_fraction, grpo_loss, grpo_loss_weights
from .mismatch import importance_weights, off_policy_mask
from .ppo import ClipFraction, clip_fraction, ppo_loss
from .value import value_loss

__all__ = [
    "ClipFraction",
    "clip_fraction",
    "grpo_clip_fraction",
    "grpo_loss",
    "grpo_loss_weights",
    "importance_weights",
    "off_policy_mask",
    "ppo_loss",
    "value_loss",
]
