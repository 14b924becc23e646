"""Configurations of `rlhf demo` and `rlhf frontier`."""

from dataclasses import dataclass

from ..config.base import DATA, OPTIMIZATION, OUTPUT, FolderConfig, at_least


@dataclass
class DemoConfig:
    """Options of `rlhf demo`."""

    output_dir: str = OUTPUT.option("demo_output", "The folder of models, preferences, metrics and the picture.")
    overwrite_output_dir: bool = OUTPUT.option(
        False, "Replace output_dir if it exists; without it, the next free name is used."
    )
    lm_steps: int = OPTIMIZATION.option(400, "Steps of language modelling that make the first model.")
    demonstrations: int = DATA.option(2048, "Reviews for SFT.")
    pairs: int = DATA.option(4096, "Pairs of reviews to compare.")
    completions: int = DATA.option(16, "Reviews a prompt that rejection sampling chooses from.")
    dpo_epochs: int = OPTIMIZATION.option(3, "Passes over the pairs.")
    seed: int = OUTPUT.option(0, "Seeds every random draw.")

    def __post_init__(self) -> None:
        at_least(self, 1, "lm_steps", "demonstrations", "pairs", "completions", "dpo_epochs")


@dataclass(kw_only=True)
class FrontierConfig(FolderConfig):
    """Options of `rlhf frontier`."""

    output_dir: str = OUTPUT.option("frontier_output", "The folder of models, results and pictures.")
    quick: bool = OPTIMIZATION.option(
        False, "One seed, few strengths, short trainings: to see that all runs, not how it comes out."
    )
    seeds: int = OPTIMIZATION.option(3, "How often every training is repeated, with other data and another order.")
    reward_model_seeds: int = OPTIMIZATION.option(9, "The same of reward models, which differ more and cost less.")
    workers: int | None = OPTIMIZATION.option(
        None, "Trainings at once, with one thread each; default: as many as there are cores.", may_change=True
    )
    seed: int = OUTPUT.option(0, "Seeds every random draw.")

    def __post_init__(self) -> None:
        at_least(self, 1, "seeds", "reward_model_seeds", "workers")
        at_least(self, 0, "seed")
