"""Configurations of `rlhf sft`, `rlhf reward` and `rlhf dpo`."""

from dataclasses import dataclass
from typing import Literal

from ..config.base import DATA, LOSS, MODEL, OPTIMIZATION, OUTPUT, Optimizer, Scheduler, TrainConfig, at_least
from ..errors import UsageError

LossType = Literal[
    "sigmoid", "hinge", "ipo", "ipo_mean", "robust", "simpo", "apo_zero", "apo_down", "sppo", "nca", "exo", "aot",
    "discopop",
]  # fmt: skip


@dataclass(kw_only=True)
class SequenceConfig(TrainConfig):
    """Options of commands in which processes can share sequences."""

    sp_size: int = OPTIMIZATION.option(1, "So many processes hold each a part of every sequence's positions.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "sp_size")
        for name in ("packing", "share_prefix", "padding_free"):
            if self.sp_size > 1 and getattr(self, name, False):
                raise UsageError(f"{name}: rows that hold more than one sequence are not shared: leave sp_size at 1")


@dataclass(kw_only=True)
class SFTConfig(SequenceConfig):
    """Options of `rlhf sft`. Batches of 256, as InstructGPT's and Tulu 3's are of that order."""

    assistant_only_loss: bool = DATA.option(True, "Learn the assistant's messages only; false: the whole conversation.")
    last_turn_only: bool = DATA.option(False, "Learn only the assistant's last message.")
    max_length: int = DATA.option(1024, "Tokens of a sequence; a longer one is cut, and the cuts counted.")
    packing: bool = DATA.option(False, "Put several conversations into a row of max_length; none sees another.")
    batch_size: int = OPTIMIZATION.option(
        256, "Conversations per optimizer step, over all processes and micro-batches together."
    )
    lr_scheduler_type: Scheduler = OPTIMIZATION.option("cosine", "After the warm-up: stay, or fall to 0.")
    project: str = OUTPUT.option("rlhf-sft", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "max_length")
        if self.last_turn_only and not self.assistant_only_loss:
            raise UsageError("last_turn_only learns the assistant's last message: leave assistant_only_loss on with it")


@dataclass(kw_only=True)
class PairConfig(TrainConfig):
    """Options of commands that train on pairs of responses."""

    max_prompt_length: int = DATA.option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_length: int = DATA.option(1024, "Tokens of a sequence; a longer one is cut, and the cuts counted.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_prompt_length")
        if self.max_length <= self.max_prompt_length:
            raise UsageError(
                f"max_length must leave room for a response: it must exceed "
                f"max_prompt_length={self.max_prompt_length}, got {self.max_length}"
            )


@dataclass(kw_only=True)
class RewardConfig(PairConfig):
    """Options of `rlhf reward`. One epoch: more of them overfit, says InstructGPT, appendix C.2."""

    loss_type: Literal["bradley_terry", "margin_ranking"] = LOSS.option("bradley_terry", "The pair loss.")
    margin: float = LOSS.option(1.0, "How far apart margin_ranking wants the two rewards.")
    label_smoothing: float = LOSS.option(0.0, "The share of labels taken to be flipped (bradley_terry).")
    center_rewards_coefficient: float = LOSS.option(
        0.0, "Holds a pair's rewards near 0; 0.01 is usual (bradley_terry)."
    )
    compare_with: list[str] = MODEL.several(
        "Reward models, say of other seeds: their disagreement on eval_dataset is reported.", may_change=True
    )
    project: str = OUTPUT.option("rlhf-reward", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "margin", "label_smoothing", "center_rewards_coefficient")
        if self.margin != 1.0 and self.loss_type != "margin_ranking":
            raise UsageError(f"margin is for loss_type margin_ranking; {self.loss_type} takes margins from the data")
        if self.compare_with and self.eval_dataset is None:
            raise UsageError("compare_with: models are compared on held-out pairs, so pass eval_dataset")


@dataclass(kw_only=True)
class DPOConfig(SequenceConfig, PairConfig):
    """Options of `rlhf dpo`. The algorithm's defaults are those of the DPO paper, appendix B, but for its warm-up of
    150 steps, which only runs as long as its own can have."""

    ref_model_name_or_path: str | None = MODEL.option(
        None, "The reference model; default: the model before training.", names_input=True
    )
    ref_cache_dir: str | None = MODEL.option(
        None, "The folder of cached reference log-probs; default: ~/.cache/rlhf_trainer."
    )
    beta: float = LOSS.option(0.1, "How strongly the reference holds the policy back.")
    loss_type: LossType = LOSS.option("sigmoid", "The pair loss.")
    label_smoothing: float = LOSS.option(0.0, "The share of labels taken to be flipped (cDPO; robust; exo).")
    gamma_beta_ratio: float = LOSS.option(0.5, "SimPO's target margin, in units of beta.")
    share_prefix: bool = OPTIMIZATION.option(
        False, "Run a prompt once for all its responses, where the model's attention can."
    )
    padding_free: bool = OPTIMIZATION.option(
        False, "Run a micro-batch's responses in one row without padding, where the model's attention can."
    )
    optim: Optimizer = OPTIMIZATION.option("rmsprop", "The optimizer.")
    learning_rate: float = OPTIMIZATION.option(1e-6, "The learning rate after the warm-up.")
    warmup_steps: float = OPTIMIZATION.option(
        0.1, "Steps over which the learning rate rises linearly from 0; below 1: their share of all steps."
    )
    max_grad_norm: float = OPTIMIZATION.option(10.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    project: str = OUTPUT.option("rlhf-dpo", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "beta")
        if self.padding_free and self.share_prefix:
            raise UsageError("padding_free and share_prefix lay a batch out each in its own way: leave one of them off")
