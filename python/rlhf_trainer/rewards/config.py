"""Configurations of commands that reward completions, and of `rlhf rejection`."""

import math
from dataclasses import dataclass
from typing import Literal

from ..config.base import DATA, REWARDS, SELECTION, OutputConfig, at_least
from ..errors import UsageError


@dataclass(kw_only=True)
class RewardsConfig(OutputConfig):
    """Options of commands that reward completions: by a reward model, reward functions, or a weighted sum."""

    reward_model_name_or_path: str | None = REWARDS.option(
        None, "A reward model: a local folder or a hub id.", names_input=True
    )
    reward_funcs: list[str] = REWARDS.several(
        "Reward functions: exact_answer, regex:PATTERN, ..., module:function, model:FOLDER."
    )
    reward_weights: list[float] = REWARDS.several(
        "Their weights in the reward, the reward model's first; default: 1 each."
    )

    @property
    def needs_rewards(self) -> bool:
        """Whether nothing else rewards the completions."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.reward_funcs) + (self.reward_model_name_or_path is not None)
        if count == 0 and self.needs_rewards:
            raise UsageError("nothing rewards the completions: pass reward_model_name_or_path or reward_funcs")
        if self.reward_weights and len(self.reward_weights) != count:
            raise UsageError(f"reward_weights: expected {count}, one for each reward, got {len(self.reward_weights)}")
        if not all(math.isfinite(weight) for weight in self.reward_weights):
            raise UsageError(f"reward_weights must be finite, got {self.reward_weights}")


@dataclass(kw_only=True)
class RejectionConfig(RewardsConfig):
    """Options of `rlhf rejection`."""

    completions: list[str] = DATA.several("Files of `rlhf sample`, or folders that hold them.", names_input=True)
    min_reward: float | None = SELECTION.option(
        None, "Select only completions with at least this reward, say the correct ones."
    )
    selection: Literal["top_per_prompt", "top_k_overall", "random"] = SELECTION.option(
        "top_per_prompt", "The best of each prompt; the best of all; or as many at random, to compare with."
    )
    k: int = SELECTION.option(1, "How many: of each prompt (top_per_prompt, random), or in all (top_k_overall).")
    max_per_prompt: int | None = SELECTION.option(None, "At most so many of one prompt (top_k_overall).")
    per_device_eval_batch_size: int = REWARDS.option(32, "Completions scored at once.")
    max_length: int = REWARDS.option(
        1024, "Tokens of prompt and completion to reward models; a longer completion is left out."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "k", "max_per_prompt", "per_device_eval_batch_size", "max_length")
        if self.max_per_prompt is not None and self.selection != "top_k_overall":
            raise UsageError(f"max_per_prompt is for selection top_k_overall; with {self.selection}, k is per prompt")
        if not self.completions:
            raise UsageError("completions: name at least one file of completions")
        if self.min_reward is not None and math.isnan(self.min_reward):
            raise UsageError("min_reward must be a number, got nan")
