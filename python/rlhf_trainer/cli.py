"""The command line: `rlhf STAGE --config x.yaml [--flag value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from .config import base as config
from .errors import UsageError
from .online import config as online_config


class Command(NamedTuple):
    """`module`.`function` takes a `config`; it is imported when the flags are known good, as torch takes seconds."""

    config: type
    module: str
    function: str
    summary: str

    def run(self, name: str, argv: Sequence[str]) -> None:
        from .config.parse import parse_config

        given = parse_config(self.config, argv, f"rlhf {name}", f"{self.summary[0].upper()}{self.summary[1:]}.")
        from transformers.utils import logging

        logging.disable_progress_bar()  # a run shows one bar, its own
        from .training.processes import leave_processes

        function: Callable[[Any], object] = getattr(import_module(f".{self.module}", __package__), self.function)
        try:
            function(given)
        finally:
            leave_processes()


COMMANDS = {
    "sft": Command(config.SFTConfig, "sft", "train_sft", "fine-tune a model on conversations or demonstrations"),
    "reward": Command(config.RewardConfig, "reward_model", "train_reward", "train a reward model on preferences"),
    "sample": Command(config.SampleConfig, "sampling", "sample", "write completions of prompts with some models"),
    "reject": Command(config.RejectConfig, "rejection", "reject", "keep the completions with the best rewards"),
    "pairs": Command(config.PairsConfig, "pairs", "make_pairs", "make preferences of scored completions"),
    "dpo": Command(config.DPOConfig, "dpo", "train_dpo", "train a model on a file of preferences with DPO"),
    "ppo": Command(online_config.PPOConfig, "ppo", "train_ppo", "raise rewards with PPO and a KL penalty"),
    "grpo": Command(online_config.GRPOConfig, "grpo", "train_grpo", "raise rewards relative to a group's (GRPO)"),
    "rounds": Command(config.RoundsConfig, "rounds", "train_rounds", "sample, score and train with DPO, in rounds"),
    "evaluate": Command(config.EvaluateConfig, "evaluate", "evaluate", "win rate, reward, KL, length on new prompts"),
    "recipe": Command(config.RecipeConfig, "recipe", "run_recipe", "the stages of a YAML file in order, to one report"),
    "frontier": Command(config.FrontierConfig, "frontier", "run", "reward over KL of each method, exact, on a CPU"),
    "demo": Command(config.DemoConfig, "demo", "run", "the pipeline on a CPU in minutes, with a known reward"),
}  # fmt: skip


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: rlhf COMMAND [--config file.yaml] [--flag value ...]\n\n{commands}\n\n"
        "rlhf COMMAND --help lists its flags."
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"rlhf: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name].run(name, rest)
    except UsageError as error:
        print(f"rlhf {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nrlhf {name}: interrupted; the same command with --resume goes on from what it has kept", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
