"""Reward functions by name, from a configuration."""

from collections.abc import Callable

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
    makers = [] if model is None else [model_maker(model, key)]
    makers += [maker_of(spec) for spec in config.reward_funcs]
    functions = [make(config, device, batch_size) for make in makers]
    return Rewards(functions, config.reward_weights or [1.0] * len(functions))


Maker = Callable[[RewardsConfig, torch.device, int], Reward]


def model_maker(name: str, key: str) -> Maker:
    return lambda config, device, batch_size: ModelReward(name, config, device, batch_size, key=key)


def maker_of(spec: str) -> Maker:
    """The function that makes the reward named by `spec`; UsageError where there is none such."""
    name, _, argument = spec.partition(":")
    if name == MODEL:
        return model_maker(argument, "reward_funcs")
    if name == CLASSIFIER:
        folder, _, label = argument.rpartition(":")
        if not folder or not label:
            raise UsageError(f"reward_funcs: expected classifier:NAME:LABEL, got {spec!r}")
        return lambda config, device, batch_size: ClassifierReward(folder, label, config, device, batch_size)
    if name == REGEX or spec in VERIFIABLE:
        try:
            verifiable = regex_of(argument) if name == REGEX else VERIFIABLE[spec]
        except ValueError as error:
            raise UsageError(f"reward_funcs: {spec!r}: {error}") from error
        if verifiable.is_slow:
            print(f"{name}: completions run {protections()}")
        row_reward = RowReward(name, verifiable)
        return lambda *_: row_reward
    if not argument or name in {known.partition(":")[0] for known in VERIFIABLE}:
        known = ", ".join([*VERIFIABLE, f"{REGEX}:PATTERN", f"{MODEL}:NAME", f"{CLASSIFIER}:NAME:LABEL"])
        raise UsageError(
            f"reward_funcs: {spec!r} is unknown; known are {known}, and module:function for one of your own"
        )
    user_reward = UserReward(spec, import_function(spec, "reward_funcs:"))
    return lambda *_: user_reward
