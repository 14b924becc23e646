"""Options of all commands: how a configuration's fields are declared, and the fields that most commands share.

Every room has a `config.py` of its own for its commands. `parse.py` reads configurations from flags and YAML.
"""

import math
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, NamedTuple

from ..errors import UsageError

Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_bnb_8bit", "rmsprop", "adafactor", "muon"
]  # fmt: skip
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
RowFormat = Literal["auto", "plain", "hh", "tldr", "imdb", "ultrafeedback", "gsm8k"]


class Subject(NamedTuple):
    """A heading of `--help`, and the declarations of the fields below it.

    `may_change`: a resumed run may have another value than the run that it goes on with.
    `names_input`: the value is a file, a folder or a hub id that must be there before a run begins.
    """

    title: str

    def option(self, default: Any, help: str, *, may_change: bool = False, names_input: bool = False) -> Any:
        return field(default=default, metadata=self._metadata(help, may_change, names_input))

    def required(self, help: str, *, may_change: bool = False, names_input: bool = False) -> Any:
        return field(metadata=self._metadata(help, may_change, names_input))

    def several(self, help: str, *, may_change: bool = False, names_input: bool = False, action: str = "store") -> Any:
        """A list, empty by default; action "extend": its flag may be passed again and again."""
        return field(default_factory=list, metadata=self._metadata(help, may_change, names_input) | {"action": action})

    def _metadata(self, help: str, may_change: bool, names_input: bool) -> dict[str, Any]:
        return {"help": help, "subject": self.title, "may_change": may_change, "names_input": names_input}


MODEL = Subject("models")
ADAPTER = Subject("adapters (LoRA)")
DATA = Subject("data")
GENERATION = Subject("generation")
SERVER = Subject("generation by a server")
REWARDS = Subject("rewards")
JUDGE = Subject("judge")
SELECTION = Subject("selection")
LOSS = Subject("loss")
OPTIMIZATION = Subject("optimization")
RECIPE = Subject("recipe")
OUTPUT = Subject("output")
SUBJECTS = (MODEL, ADAPTER, DATA, GENERATION, SERVER, REWARDS, JUDGE, SELECTION, LOSS, OPTIMIZATION, RECIPE, OUTPUT)


def names_with(config: type, flag: str) -> list[str]:
    """The fields of a configuration whose declaration sets `flag`, "may_change" or "names_input"."""
    return [field.name for field in fields(config) if field.metadata.get(flag)]


@dataclass(kw_only=True)
class FolderConfig:
    """Options of every command that leaves a folder."""

    output_dir: str = OUTPUT.required("The folder of the results and of this configuration.")
    overwrite_output_dir: bool = OUTPUT.option(
        False, "Replace output_dir if it exists; without this flag nothing is replaced.", may_change=True
    )
    resume_from_checkpoint: bool = OUTPUT.option(
        False, "Go on where a run into output_dir stopped; from the start if there is none.", may_change=True
    )


@dataclass(kw_only=True)
class OutputConfig(FolderConfig):
    """Options of every command that runs models."""

    seed: int = OUTPUT.option(42, "Seeds every random draw.")
    chat_template_date: str | None = OUTPUT.option(
        None, "The moment that chat templates take for the present, ISO 8601; default: the run's start."
    )
    trust_remote_code: bool = MODEL.option(False, "Run model code that comes with a hub repository.")
    attn_implementation: str | None = MODEL.option(None, "Passed to transformers: eager, sdpa, flash_attention_2, ...")
    bf16: bool = MODEL.option(False, "Compute in bfloat16 (autocast), with fp32 master weights.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = MODEL.option(
        None, "Of weights; default: float32 to train, bfloat16 below an adapter, else as they were saved (auto)."
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value >= 2**63:
                raise UsageError(f"{name} must be below 2**63, got {value}")
        at_least(self, 0, "seed")
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        try:
            datetime.fromisoformat(self.chat_template_date or "2026-01-01")
        except ValueError as error:
            raise UsageError(f"chat_template_date: expected a date as 2026-01-31T12:00:00, got {error}") from error


@dataclass(kw_only=True)
class DataConfig:
    """Options of every command that reads a data set."""

    dataset_name: str = DATA.required("A .jsonl, .json, .csv or .parquet file, or a hub id.", names_input=True)
    dataset_config: str | None = DATA.option(None, "The configuration (subset) of a hub data set.")
    dataset_format: RowFormat = DATA.option("auto", "How rows are laid out; auto goes by their columns.")
    dataset_streaming: bool = DATA.option(False, "Read a hub data set row by row, not downloaded whole first.")
    skip_invalid_rows: bool = DATA.option(False, "Leave invalid rows out and report them, instead of stopping.")


@dataclass(kw_only=True)
class AdapterConfig(OutputConfig):
    """Options of every command that can train an adapter in the place of the weights; their names are TRL's."""

    use_peft: bool = ADAPTER.option(False, "Train a LoRA adapter; of a model that is an adapter, that one.")
    lora_r: int = ADAPTER.option(16, "The rank of the adapter's matrices.")
    lora_alpha: int = ADAPTER.option(32, "The adapter counts lora_alpha / lora_r times.")
    lora_dropout: float = ADAPTER.option(0.05, "Dropout before the adapter, in updates only.")
    lora_target_modules: list[str] = ADAPTER.several("Layers: names, a pattern, all-linear; default: peft's own.")
    lora_modules_to_save: list[str] = ADAPTER.several("Layers that are trained whole, and saved with the adapter.")
    use_rslora: bool = ADAPTER.option(False, "Count it lora_alpha / sqrt(lora_r) times (rank-stabilised LoRA).")
    use_dora: bool = ADAPTER.option(False, "Train the magnitudes of the weights, too (DoRA).")
    merge_adapter: bool = ADAPTER.option(False, "Save whole weights, the adapter merged into them.")
    load_in_4bit: bool = ADAPTER.option(False, "Quantize the frozen base to four bits, by bitsandbytes (QLoRA).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = ADAPTER.option("nf4", "The four-bit numbers of load_in_4bit.")
    use_bnb_nested_quant: bool = ADAPTER.option(False, "With load_in_4bit, quantize the scales, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        names = ("lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora")
        names += ("merge_adapter", "load_in_4bit")
        if not self.use_peft and any(getattr(self, name) for name in names):
            raise UsageError(f"{next(name for name in names if getattr(self, name))} is for an adapter: pass use_peft")
        if self.lora_modules_to_save and self.use_peft and not self.bf16 and self.dtype != "float32":
            raise UsageError("lora_modules_to_save: layers trained in fp32 want bf16, or a base of dtype float32")
        if self.load_in_4bit and self.merge_adapter:
            raise UsageError(
                "merge_adapter: four-bit weights cannot take an adapter. Leave it out, and have `rlhf merge` put the "
                "result into the weights as they were saved"
            )
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            raise UsageError("use_bnb_nested_quant is for load_in_4bit")


@dataclass(kw_only=True)
class TrainConfig(AdapterConfig, DataConfig):
    """Options of every command that trains."""

    model_name_or_path: str = MODEL.required("The model to train: a local folder or a hub id.", names_input=True)
    tokenizer_name_or_path: str | None = MODEL.option(None, "The tokenizer; default: the model's.", names_input=True)
    chat_template_path: str | None = DATA.option(None, "chatml, or a Jinja file; default: the tokenizer's own.")
    dry_run: bool = OUTPUT.option(False, "Print what the run will take, from shapes alone, and stop.", may_change=True)
    dry_run_processes: int = OUTPUT.option(
        1, "With dry_run: plan for so many processes, over which FSDP2 cuts weights.", may_change=True
    )
    inspect_rows: int = DATA.option(2, "Print so many rows as they will be trained before training; 0: none.")
    gradient_checkpointing: bool = MODEL.option(False, "Recompute activations in the backward pass to save memory.")

    dataset_train_split: str = DATA.option("train", "The split of a hub data set.")
    eval_dataset: str | None = DATA.option(None, "Held-out rows, in the same formats.", names_input=True)
    dataset_test_split: str = DATA.option("test", "The split of a hub evaluation set.")
    eval_steps: int | None = DATA.option(None, "Evaluate every so many steps; default: before training and at its end.")

    num_train_epochs: int = OPTIMIZATION.option(1, "Passes over the data.", may_change=True)
    max_steps: int | None = OPTIMIZATION.option(
        None, "Stop after so many optimizer steps, whatever num_train_epochs says.", may_change=True
    )
    batch_size: int = OPTIMIZATION.option(
        64, "Examples per optimizer step, over all processes and micro-batches together."
    )
    micro_batch_size: int = OPTIMIZATION.option(
        8, "Examples per forward pass; changes memory and speed, not the result."
    )
    optim: Optimizer = OPTIMIZATION.option("adamw_torch_fused", "The optimizer.")
    learning_rate: float = OPTIMIZATION.option(1e-5, "The learning rate after the warm-up.")
    lr_scheduler_type: Scheduler = OPTIMIZATION.option("constant_with_warmup", "After the warm-up: stay, or fall to 0.")
    lr_scheduler_kwargs: str | None = OPTIMIZATION.option(None, "What the schedule takes beside, a JSON object.")
    warmup_steps: float = OPTIMIZATION.option(
        0, "Steps over which the learning rate rises linearly from 0; below 1: their share of all steps."
    )
    warmup_ratio: float | None = OPTIMIZATION.option(None, "Their share of all steps, in the place of warmup_steps.")
    weight_decay: float = OPTIMIZATION.option(0.0, "Decoupled for adamw, added to the gradient for rmsprop.")
    adam_beta1: float = OPTIMIZATION.option(0.9, "Of adamw: how much of the mean gradient is kept a step.")
    adam_beta2: float = OPTIMIZATION.option(0.999, "Of adamw: how much of the mean squared gradient is kept a step.")
    adam_epsilon: float = OPTIMIZATION.option(1e-8, "Of adamw: added to the root of the mean squared gradient.")
    max_grad_norm: float = OPTIMIZATION.option(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    workspace_mib: int | None = OPTIMIZATION.option(
        None, "Scratch memory of the losses; enough for the logits twice saves time."
    )

    load_best_model_at_end: bool = OUTPUT.option(False, "Save the weights of the best evaluation, not the last.")
    metric_for_best_model: str | None = OUTPUT.option(None, "Of evaluations; default: loss, or reward where none is.")
    greater_is_better: bool | None = OUTPUT.option(None, "Of that metric; default: unless its name ends with loss.")
    early_stopping_patience: int | None = OUTPUT.option(
        None, "Stop after so many evaluations that are no better than the best."
    )
    push_to_hub: bool = OUTPUT.option(False, "Upload the result to the Hugging Face hub.", may_change=True)
    hub_model_id: str | None = OUTPUT.option(None, "Its name there; default: that of output_dir.", may_change=True)
    hub_private_repo: bool | None = OUTPUT.option(None, "Whether it is private there.", may_change=True)
    save_only_model: bool = OUTPUT.option(
        False, "Keep no optimizer state in output_dir: twice the weights, to train on from there.", may_change=True
    )
    logging_steps: int = OUTPUT.option(1, "Where there is no terminal, print every so many steps.", may_change=True)
    save_steps: int = OUTPUT.option(100, "Save a checkpoint every so many steps.", may_change=True)
    async_save: bool = OUTPUT.option(
        False, "Write checkpoints while training goes on, from a copy in the host's memory.", may_change=True
    )
    report_to: list[str] = OUTPUT.several("Trackers of accelerate: tensorboard, wandb, trackio, ...", may_change=True)
    project: str = OUTPUT.option("rlhf", "The project's name in the trackers.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "inspect_rows", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm")
        at_least(self, 0, "learning_rate")
        if self.warmup_ratio is not None and self.warmup_ratio >= 1:
            raise UsageError(f"warmup_ratio must be below 1, got {self.warmup_ratio}; warmup_steps counts steps")
        if not self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be finite, got {self.learning_rate}")
        if self.lr_scheduler_type == "constant" and self.warmup:
            raise UsageError(
                f"lr_scheduler_type constant has no warm-up: pass warmup_steps 0, not {self.warmup:g}, or "
                "lr_scheduler_type constant_with_warmup"
            )
        if self.eval_steps is not None and self.eval_dataset is None:
            raise UsageError("eval_steps: there is nothing to evaluate on, so pass eval_dataset")
        judged = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience")
        wanted = [name for name in judged if getattr(self, name) not in (None, False)]
        if wanted and self.eval_dataset is None:
            raise UsageError(f"{wanted[0]}: evaluations are compared, so pass eval_dataset, and eval_steps")
        at_least(self, 1, "early_stopping_patience")
        at_least(self, 1, "num_train_epochs", "max_steps", "batch_size", "micro_batch_size", "eval_steps")
        at_least(self, 1, "save_steps", "logging_steps", "dry_run_processes")
        at_least(self, 8, "workspace_mib")

    @property
    def trained_dtype(self) -> str:
        """That of the weights of the model to train. Updates at a learning rate of 1e-6 vanish in bf16, so that it has
        fp32 weights; below an adapter, which is what trains then, it is in bf16."""
        return self.dtype or ("bfloat16" if self.use_peft else "float32")

    @property
    def warmup(self) -> float:
        """Steps of the warm-up, or below 1 their share of all steps."""
        return self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio

    def warmup_in(self, steps: int) -> int:
        """The steps of the warm-up in a run of `steps`."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(steps * self.warmup)


def at_least(config: Any, minimum: float, *names: str) -> None:
    """UsageError for fields that have a value below `minimum`, or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")
