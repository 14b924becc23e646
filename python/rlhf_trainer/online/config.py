"""Configurations of commands that learn from the model's own completions: `rlhf ppo` and `rlhf grpo`."""

import math
from dataclasses import dataclass
from typing import Literal

from ..config.base import DATA, GENERATION, LOSS, MODEL, OPTIMIZATION, OUTPUT, REWARDS, SERVER, TrainConfig, at_least
from ..errors import UsageError
from ..rewards.config import RewardsConfig
from ..rollouts.config import WEIGHT_SYNC_HELP, Kind, ServerConfig

GRPOLossType = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "sapo"]
WeighingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]
KL_ERROR_BOUND = 0.2  # of the relative error that adapts beta: Ziegler et al. (2019), sec. 2.2


def clip_range(low: float, high: float | None) -> tuple[float, float]:
    """How far a ratio may be below and above 1; `high` None: as far as `low`."""
    return low, low if high is None else high


@dataclass(kw_only=True)
class OnlineConfig(RewardsConfig, ServerConfig, TrainConfig):
    """Options of both. A step is an iteration: completions are drawn, rewarded, and learned from."""

    dataset_name: str = DATA.required("Prompts: a .jsonl, .json, .csv or .parquet file, or a hub id.", names_input=True)
    max_prompt_length: int = DATA.option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_completion_length: int = GENERATION.option(512, "A completion ends here at the latest.")
    temperature: float = GENERATION.option(
        1.0, "Divides the logits, when tokens are drawn and when their log-probs are taken."
    )
    environment: str | None = GENERATION.option(
        None, "module:Class, with reset(row) and step(messages): it answers the model's turns, and rewards them."
    )
    num_generations: int = GENERATION.option(1, "Completions of each prompt.")
    weight_sync: Kind = SERVER.option("auto", WEIGHT_SYNC_HELP)
    max_off_policy_steps: int = SERVER.option(
        0, "So many iterations ahead of training may servers draw; 0: all completions are the present policy's."
    )
    per_device_generation_batch_size: int = GENERATION.option(32, "Completions generated, or scored, at once.")
    batch_size: int = OPTIMIZATION.option(
        64, "Completions of an iteration, over all processes and micro-batches together."
    )
    num_mini_batches: int = OPTIMIZATION.option(1, "Optimizer steps that an iteration's completions are divided into.")

    save_steps: int = OUTPUT.option(10, "Save a checkpoint every so many iterations.", may_change=True)
    ref_model_name_or_path: str | None = MODEL.option(
        None, "The reference model; default: the model before training.", names_input=True
    )
    beta: float = LOSS.option(
        0.05, "How strongly KL(policy || reference) holds the policy back; 0: no reference is needed."
    )
    kl_estimator: KLEstimator = LOSS.option(
        "k1",
        "From the token that was drawn, or exact over all. In the reward, only k1 and exact have the KL's gradient.",
    )
    kl_in: Literal["reward", "loss"] = LOSS.option(
        "reward", "Where the KL is subtracted: a constant, or with a gradient."
    )
    target_kl: float | None = LOSS.option(None, "Adapts beta so that completions come to this KL, in nats.")
    kl_gain: float = LOSS.option(0.1, "How fast beta adapts: by at most a fifth of this an iteration.")
    vllm_importance_sampling_correction: bool = LOSS.option(
        True, "With use_vllm, weigh what servers drew by its probability now over that at which they drew it."
    )
    vllm_importance_sampling_mode: WeighingMode = LOSS.option(
        "sequence_mask", "Weights of tokens or of sequences; beyond the bounds they are truncated, or 0."
    )
    vllm_importance_sampling_clip_max: float | None = LOSS.option(3.0, "The largest weight; null: none is.")
    vllm_importance_sampling_clip_min: float | None = LOSS.option(None, "The smallest weight.")
    off_policy_mask_threshold: float | None = LOSS.option(
        None, "Do not learn from what was worse than expected, where the sampler is so many nats a token off; 0.5, say."
    )
    delta: float | None = LOSS.option(None, "Where an advantage is below 0, the ratio counts for at most this: 4, say.")
    missing_eos_penalty: float = REWARDS.option(
        0.0, "Subtracted from the reward of a completion that did not end in time."
    )
    reward_clip: float | None = REWARDS.option(None, "Rewards are clipped to plus and minus this.")
    mask_truncated_completions: bool = LOSS.option(
        False, "Do not learn from completions that did not end in time; means are over the others."
    )

    @property
    def needs_rewards(self) -> bool:
        return self.environment is None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.environment is not None and self.use_vllm and self.server_prompts == "text":
            raise UsageError("environment: turns are kept as the tokens that were drawn: pass server_prompts ids")
        at_least(self, 1, "max_prompt_length", "max_completion_length", "num_generations", "num_mini_batches")
        at_least(self, 1, "per_device_generation_batch_size")
        at_least(self, 0, "beta", "kl_gain", "missing_eos_penalty", "max_off_policy_steps")
        if self.max_off_policy_steps and not self.use_vllm:
            raise UsageError("max_off_policy_steps: in this process nothing is drawn while it trains: pass use_vllm")
        for name in ("temperature", "reward_clip", "target_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be finite and above 0, got {value}")
        if self.batch_size % self.num_generations:
            raise UsageError(
                f"batch_size counts completions: it must be a multiple of num_generations={self.num_generations}, "
                f"got {self.batch_size}"
            )
        if self.batch_size % self.num_mini_batches:
            raise UsageError(f"num_mini_batches must divide batch_size={self.batch_size}, got {self.num_mini_batches}")
        if not self.beta < math.inf:
            raise UsageError(f"beta must be finite, got {self.beta}")
        if not self.kl_gain < 1 / KL_ERROR_BOUND:
            raise UsageError(f"kl_gain must be below {1 / KL_ERROR_BOUND:g}, or beta would reach 0; got {self.kl_gain}")
        if self.beta and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UsageError("kl_in loss with kl_estimator k1: its expected gradient is zero. Take k2, k3 or exact")
        if self.off_policy_mask_threshold is not None and not self.off_policy_mask_threshold > 0:
            raise UsageError(f"off_policy_mask_threshold must be above 0, got {self.off_policy_mask_threshold}")
        if not 0 <= self.weight_bounds[0] < self.weight_bounds[1]:
            raise UsageError(
                "vllm_importance_sampling_clip_min must be at least 0, and vllm_importance_sampling_clip_max above it, "
                f"got {self.weight_bounds[0]:g} and {self.weight_bounds[1]:g}"
            )
        if self.delta is not None and not self.delta > 1:
            raise UsageError(f"delta must be above 1, got {self.delta}")
        if self.target_kl is not None and not self.beta:
            raise UsageError("target_kl adapts beta, which must start above 0")

    @property
    def weight_bounds(self) -> tuple[float, float]:
        """Of the weights of what servers drew."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        return 0.0 if low is None else low, math.inf if high is None else high

    def score_of(self, reward: float, finished: bool) -> float:
        """The reward, clipped, and less where the completion did not end."""
        bound = math.inf if self.reward_clip is None else self.reward_clip
        return min(max(reward, -bound), bound) - (0.0 if finished else self.missing_eos_penalty)

    def check_clip(self, low: str, high: str) -> None:
        """The ratio is clipped to [1 - low, 1 + high]; `high` None: as far as `low`."""
        at_least(self, 0, low, high)
        if getattr(self, low) > 1:
            raise UsageError(f"{low} must be at most 1, as ratios are positive, got {getattr(self, low)}")


@dataclass(kw_only=True)
class PPOConfig(OnlineConfig):
    """Options of `rlhf ppo`."""

    value_model: Literal["shared", "separate"] = MODEL.option(
        "separate", "Values: a head on the policy's own hidden states, or a model of their own."
    )
    value_model_name_or_path: str | None = MODEL.option(
        None,
        "What a separate value model starts from; default: the reward model, or else the model itself.",
        names_input=True,
    )
    num_ppo_epochs: int = OPTIMIZATION.option(4, "Passes over an iteration's completions.")
    cliprange: float = LOSS.option(
        0.2, "The ratio to the policy that drew the completions is clipped below 1 minus this."
    )
    cliprange_high: float | None = LOSS.option(None, "It is clipped above 1 plus this; default: cliprange.")
    cliprange_value: float = LOSS.option(
        0.2, "A value that moved farther from the old one gets no gradient; inf: not clipped."
    )
    vf_coef: float = LOSS.option(0.1, "Weight of the value loss.")
    entropy_coef: float = LOSS.option(0.0, "Weight of the entropy bonus.")
    gamma: float = LOSS.option(1.0, "Discount a token.")
    lam: float = LOSS.option(0.95, "GAE's lambda: 1 sums up rewards, 0 trusts the next value.")
    whiten_rewards: bool = LOSS.option(False, "Rewards of tokens to variance 1 around their mean, over the iteration.")
    whiten_advantages: bool = LOSS.option(True, "Advantages to mean 0 and variance 1 over the iteration's tokens.")
    learning_rate: float = OPTIMIZATION.option(3e-6, "The learning rate after the warm-up.")
    project: str = OUTPUT.option("rlhf-ppo", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_clip("cliprange", "cliprange_high")
        at_least(self, 1, "num_ppo_epochs")
        at_least(self, 0, "vf_coef", "cliprange_value", "entropy_coef")
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
    """Options of `rlhf grpo`."""

    num_generations: int = GENERATION.option(8, "Completions of each prompt, whose rewards are compared.")
    num_iterations: int = OPTIMIZATION.option(1, "Passes over an iteration's completions.")
    loss_type: GRPOLossType = LOSS.option(
        "grpo", "Sets advantage, ratio and mean. gspo wants an epsilon of some 3e-4; cispo an epsilon of 1."
    )
    epsilon: float = LOSS.option(
        0.2, "The ratio to the policy that drew the completions is clipped below 1 minus this."
    )
    epsilon_high: float | None = LOSS.option(None, "It is clipped above 1 plus this; default: epsilon.")
    sapo_temperature_pos: float = LOSS.option(1.0, "sapo: how fast the gate closes where the advantage is above 0.")
    sapo_temperature_neg: float = LOSS.option(1.05, "sapo: and where it is not.")
    beta: float = LOSS.option(
        0.0, "How strongly KL(policy || reference) holds the policy back; 0: no reference is needed."
    )
    kl_estimator: KLEstimator = LOSS.option(
        "k3", "Of the KL at each token: from the token that was drawn, or exact over the whole vocabulary."
    )
    kl_in: Literal["reward", "loss"] = LOSS.option(
        "loss", "Where the KL is subtracted: a constant, or with a gradient."
    )
    learning_rate: float = OPTIMIZATION.option(1e-6, "The learning rate after the warm-up.")
    project: str = OUTPUT.option("rlhf-grpo", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_clip("epsilon", "epsilon_high")
        at_least(self, 1, "num_iterations")
        if self.num_generations < 2 and self.loss_type != "reinforce":
            raise UsageError(
                f"loss_type {self.loss_type} compares completions of a prompt: num_generations must be >= 2"
            )
        if not min(self.sapo_temperature_pos, self.sapo_temperature_neg) > 0:
            raise UsageError("sapo_temperature_pos and sapo_temperature_neg must be above 0")
        if self.delta is not None and self.loss_type in ("cispo", "reinforce", "sapo"):
            raise UsageError(f"delta: loss_type {self.loss_type} has no ratio that it would bound; drop it")
        if self.beta and self.kl_in == "reward" and self.kl_estimator == "exact":
            raise UsageError(
                "kl_in reward with kl_estimator exact: tokens of a completion share an advantage, in which an exact "
                "KL would hold no token back by its own probability. Take k1, or kl_in loss"
            )
