"""The configuration of `rlhf evaluate`."""

from dataclasses import dataclass

from ..config.base import DATA, MODEL, REWARDS, at_least
from ..rewards.config import RewardsConfig
from ..rollouts.config import GenerationConfig


@dataclass(kw_only=True)
class EvaluateConfig(RewardsConfig, GenerationConfig):
    """Options of `rlhf evaluate`."""

    model_name_or_path: str = MODEL.required("The model that answers: a local folder or a hub id.", names_input=True)
    ref_model_name_or_path: str | None = MODEL.option(
        None, "The model that KL is measured from; none: no KL.", names_input=True
    )
    dataset_test_split: str = DATA.option("test", "The split of a hub data set.")
    resamples: int = REWARDS.option(1000, "Bootstrap resamples of the prompts behind each interval.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "resamples")
