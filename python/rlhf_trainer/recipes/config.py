"""Configurations of `rlhf online-dpo` and `rlhf recipe`."""

from dataclasses import dataclass
from typing import Any, Literal

from ..config.base import DATA, GENERATION, MODEL, OPTIMIZATION, OUTPUT, RECIPE, SERVER, FolderConfig, at_least
from ..errors import UsageError
from ..offline.config import DPOConfig
from ..preferences.config import PAIRING_HELP, Pairing
from ..rewards.config import RewardsConfig
from ..rollouts.config import WEIGHT_SYNC_HELP, GenerationConfig, Kind, ServerConfig


@dataclass(kw_only=True)
class OnlineDPOConfig(DPOConfig, RewardsConfig, GenerationConfig, ServerConfig):
    """Options of `rlhf online-dpo`. Those of `rlhf dpo` hold for each round."""

    dataset_name: str = DATA.required("Prompts: a .jsonl, .json, .csv or .parquet file, or a hub id.", names_input=True)
    rounds: int = OPTIMIZATION.option(
        3, "How often to sample, score and train; each round goes on with the model of the last."
    )
    num_completions: int = GENERATION.option(4, "Completions a prompt and round.")
    weight_sync: Kind = SERVER.option("auto", WEIGHT_SYNC_HELP)
    pairing: Pairing = DATA.option("best_worst", PAIRING_HELP)
    reference: Literal["previous", "first"] = MODEL.option(
        "previous", "The reference model: the one that the round starts from, or for all rounds the first one."
    )
    project: str = OUTPUT.option("rlhf-online-dpo", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template_path is not None:
            raise UsageError(
                "chat_template_path: completions are drawn with the model's own template; give it one by rlhf sft"
            )
        at_least(self, 1, "rounds")
        at_least(self, 2, "num_completions")
        if self.temperature == 0:
            raise UsageError("temperature must be above 0: at 0 all completions of a prompt are the same")
        if self.tokenizer_name_or_path is not None:
            raise UsageError(
                "tokenizer_name_or_path: a model writes with its own tokenizer, so rounds cannot train it with another "
                "one; save that one into the model's folder"
            )
        if self.ref_model_name_or_path is not None and self.reference != "first":
            raise UsageError(
                "ref_model_name_or_path: with reference: previous, each round has a reference of its own; pass "
                "reference: first to hold all rounds to this model"
            )


@dataclass(kw_only=True)
class FunctionConfig(FolderConfig):
    """The configuration of a stage that is a function of the user's: `python` is module:function."""

    python: str
    options: dict[str, Any]


@dataclass(kw_only=True)
class RecipeConfig(FolderConfig):
    """Options of `rlhf recipe`; those of its stages stand in the recipe."""

    recipe: str = RECIPE.required("The name of a recipe that is shipped, or a YAML file.", may_change=True)
    set: list[str] = RECIPE.several(
        "Changes: variable=value, or stage.key=value, as often as wanted.", may_change=True, action="extend"
    )
    dry_run: bool = RECIPE.option(False, "Check the recipe and print its stages as commands, without running them.")
