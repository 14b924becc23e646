"""Reward functions by name, from a configuration."""

from functools import partial

import torch

from ..config.functions import import_function
from ..errors import UsageError
from .config import RewardsConfig
from .model_rewards import ClassifierReward, ModelReward
from .rewards import Reward, Rewards, RowReward, UserReward
from .sandbox import protections
from .verifiable import VERIFIABLE, regex_of

MODEL, CLASSIFIER, REGEX = "model", "classifier", "regex"


def load_rewards(config: RewardsConfig, device: torch.device, *, batch_size: int = 32) -> Rewards:
    """The functions that a configuration names, the reward model first. Models, which cost most, are loaded last, and
    score `batch_size` completions at once."""
    key = "reward_model_name_or_path"
    model = getattr(config, key)
    rewards = [] if model is None else [partial(ModelReward, model, key=key)]
    rewards += map(reward_of, config.reward_funcs)
    functions = [reward(config, device, batch_size) if isinstance(reward, partial) else reward for reward in rewards]
    return Rewards(functions, config.reward_weights or [1.0] * len(functions))


def reward_of(spec: str) -> Reward | partial[Reward]:
    """The reward named by `spec`; that of a model as a call that lacks configuration, device and batch size. UsageError
    where there is none such."""
    name, _, argument = spec.partition(":")
    if name == MODEL:
        return partial(ModelReward, argument, key="reward_funcs")
    if name == CLASSIFIER:
        folder, _, label = argument.rpartition(":")
        if not folder or not label:
            raise UsageError(f"reward_funcs: expected classifier:NAME:LABEL, got {spec!r}")
        return partial(ClassifierReward, folder, label)
    if name == REGEX or spec in VERIFIABLE:
        try:
            verifiable = regex_of(argument) if name == REGEX else VERIFIABLE[spec]
        except ValueError as error:
            raise UsageError(f"reward_funcs: {spec!r}: {error}") from error
        if verifiable.is_slow:
            print(f"{name}: completions run {protections()}")
        return RowReward(name, verifiable)
    if not argument or name in {known.partition(":")[0] for known in VERIFIABLE}:
        known = ", ".join([*VERIFIABLE, f"{REGEX}:PATTERN", f"{MODEL}:NAME", f"{CLASSIFIER}:NAME:LABEL"])
        raise UsageError(
            f"reward_funcs: {spec!r} is unknown; known are {known}, and module:function for one of your own"
        )
    return UserReward(spec, import_function(spec, "reward_funcs:"))
