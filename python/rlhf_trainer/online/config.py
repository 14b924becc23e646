"""Configurations of the stages that learn from the model's own completions: `rlhf ppo` and `rlhf grpo`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config.base import JudgeConfig, ServerConfig, TrainConfig, at_least, needed, option
from ..errors import UsageError
from .kl_control import BOUND

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce"]


@dataclass(kw_only=True)
class OnlineConfig(JudgeConfig, ServerConfig, TrainConfig):
    """What both can be told. A step is an iteration: completions are drawn, rewarded, and learned from."""

    dataset: str = needed("Prompts: a .jsonl or .parquet file, or a hub id.")
    max_prompt_length: int = option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_new_tokens: int = option(512, "A completion ends here at the latest.")
    temperature: float = option(1.0, "Divides the logits, when tokens are drawn and when their log-probs are taken.")
    batch_size: int = option(64, "Completions of an iteration, over all processes and micro-batches together.")
    num_generations: int = option(1, "Completions of each prompt.")
    generation_batch_size: int = option(32, "Completions generated, or scored, at once.")
    num_mini_batches: int = option(1, "Optimizer steps that an iteration's completions are divided into.")
    num_ppo_epochs: int = option(1, "Passes over an iteration's completions.")

    save_steps: int = option(10, "Save what --resume needs every so many iterations.")
    ref_model_name_or_path: str | None = option(None, "The reference model; default: the model before training.")
    beta: float = option(0.05, "How strongly KL(policy || reference) holds the policy back; 0: no reference is needed.")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = option(
        "k1",
        "From the token that was drawn, or exact over all. In the reward, only k1 and exact have the KL's gradient.",
    )
    kl_in: Literal["reward", "loss"] = option("reward", "Where the KL is subtracted: a constant, or with a gradient.")
    target_kl: float | None = option(None, "Adapts beta so that completions come to this KL, in nats.")
    kl_gain: float = option(0.1, "How fast beta adapts: by at most a fifth of this an iteration.")
    clip_low: float = option(0.2, "The ratio to the policy that drew the completions is clipped below 1 minus this.")
    clip_high: float = option(0.2, "It is clipped above 1 plus this.")
    missing_eos_penalty: float = option(0.0, "Subtracted from the reward of a completion that did not end in time.")
    reward_clip: float | None = option(None, "Rewards are clipped to plus and minus this.")
    mask_truncated_completions: bool = option(
        False, "Do not learn from completions that did not end in time; means are over the others."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        counted = ("max_prompt_length", "max_new_tokens", "num_generations", "generation_batch_size")
        at_least(self, 1, *counted, "num_mini_batches", "num_ppo_epochs")
        at_least(self, 0, "beta", "kl_gain", "clip_low", "clip_high", "missing_eos_penalty")
        for name in ("temperature", "reward_clip", "target_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be finite and above 0, got {value}")
        if self.clip_low > 1:
            raise UsageError(f"clip_low must be at most 1, as ratios are positive, got {self.clip_low}")
        if self.batch_size % self.num_generations:
            raise UsageError(
                f"batch_size counts completions: it must be a multiple of num_generations={self.num_generations}, "
                f"got {self.batch_size}"
            )
        if self.batch_size % self.num_mini_batches:
            raise UsageError(f"num_mini_batches must divide batch_size={self.batch_size}, got {self.num_mini_batches}")
        if not self.beta < math.inf:
            raise UsageError(f"beta must be finite, got {self.beta}")
        if not self.kl_gain < 1 / BOUND:
            raise UsageError(f"kl_gain must be below {1 / BOUND:g}, or beta would reach 0; got {self.kl_gain}")
        if self.beta and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UsageError("kl_in loss with kl_estimator k1: its expected gradient is zero. Take k2, k3 or exact")
        if self.target_kl is not None and not self.beta:
            raise UsageError("target_kl adapts beta, which must start above 0")

    def score_of(self, reward: float, finished: bool) -> float:
        """The reward, clipped, and less where the completion did not end."""
        bound = math.inf if self.reward_clip is None else self.reward_clip
        return min(max(reward, -bound), bound) - (0.0 if finished else self.missing_eos_penalty)

    @property
    def reuses_completions(self) -> bool:
        """Whether the policy has moved on from the one that drew them when it learns from them."""
        return self.num_mini_batches * self.num_ppo_epochs > 1


@dataclass(kw_only=True)
class PPOConfig(OnlineConfig):
    """Everything `rlhf ppo` can be told."""

    value_model: Literal["shared", "separate"] = option(
        "separate", "Values: a head on the policy's own hidden states, or a model of their own."
    )
    value_model_name_or_path: str | None = option(
        None, "What a separate value model starts from; default: the reward_model, or else the model itself."
    )
    gamma: float = option(1.0, "Discount a token.")
    lam: float = option(0.95, "GAE's lambda: 1 sums up rewards, 0 trusts the next value.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    clip_value: float = option(0.2, "A value that moved farther from the old one gets no gradient; inf: not clipped.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    whiten_rewards: bool = option(False, "Rewards of tokens to variance 1 around their mean, over the iteration.")
    whiten_advantages: bool = option(True, "Advantages to mean 0 and variance 1 over the iteration's tokens.")
    num_ppo_epochs: int = option(4, "Passes over an iteration's completions.")
    learning_rate: float = option(3e-6, "The learning rate after the warm-up.")
    run_name: str = option("rlhf-ppo", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "vf_coef", "clip_value", "entropy_coef")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.whiten_rewards and self.beta and self.kl_estimator == "exact" and self.kl_in == "reward":
            raise UsageError(
                "whiten_rewards: with the exact KL in the reward, pass whiten_advantages or kl_in loss instead"
            )
        if self.value_model_name_or_path is not None and self.value_model == "shared":
            raise UsageError("value_model_name_or_path: a shared value head starts from the policy; drop it")


@dataclass(kw_only=True)
class GRPOConfig(OnlineConfig):
    """Everything `rlhf grpo` can be told."""

    num_generations: int = option(8, "Completions of each prompt, whose rewards are compared.")
    variant: Variant = option(
        "grpo", "Sets advantage, ratio and mean. gspo wants clips of some 3e-4; cispo clip_low 1."
    )
    is_cap: float | None = option(
        None, "Corrects for a sampler that differs from the trainer by importance weights, truncated here; 2 is usual."
    )
    beta: float = option(0.0, "How strongly KL(policy || reference) holds the policy back; 0: no reference is needed.")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = option(
        "k3", "Of the KL at each token: from the token that was drawn, or exact over the whole vocabulary."
    )
    kl_in: Literal["reward", "loss"] = option("loss", "Where the KL is subtracted: a constant, or with a gradient.")
    learning_rate: float = option(1e-6, "The learning rate after the warm-up.")
    run_name: str = option("rlhf-grpo", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2 and self.variant != "reinforce":
            raise UsageError(f"variant {self.variant} compares completions of a prompt: num_generations must be >= 2")
        if self.is_cap is not None and not self.is_cap > 0:
            raise UsageError(f"is_cap must be above 0, got {self.is_cap}")
        if self.beta and self.kl_in == "reward" and self.kl_estimator == "exact":
            raise UsageError(
                "kl_in reward with kl_estimator exact: tokens of a completion share an advantage, in which an exact "
                "KL would hold no token back by its own probability. Take k1, or kl_in loss"
            )
