"""Configurations: dataclasses that a YAML file fills and flags override."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import UsageError

Config = TypeVar("Config")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DPOConfig:
    """Everything `rlhf dpo` can be told. The defaults of the algorithm are those of the DPO paper, appendix B."""

    model_name_or_path: str = field(metadata={"help": "The model to train: a local folder or a hub id."})
    dataset: str = field(metadata={"help": "Preferences: a .jsonl or .parquet file, or a hub id."})
    output_dir: str = field(metadata={"help": "Where the trained model, its metrics and this configuration go."})
    overwrite: bool = _option(False, "Replace output_dir if it exists; without this flag nothing is replaced.")
    ref_model_name_or_path: str | None = _option(None, "The reference model; default: the model before training.")
    tokenizer_name_or_path: str | None = _option(None, "The tokenizer; default: the model's.")
    trust_remote_code: bool = _option(False, "Run model code that comes with a hub repository.")
    attn_implementation: str | None = _option(None, "Passed to transformers: eager, sdpa, flash_attention_2, ...")

    dataset_split: str = _option("train", "The split of a hub data set.")
    eval_dataset: str | None = _option(None, "Held-out preferences, in the same formats.")
    eval_split: str = _option("test", "The split of a hub evaluation set.")
    eval_steps: int | None = _option(None, "Evaluate every so many steps; default: before training and at its end.")
    max_prompt_length: int = _option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_length: int = _option(1024, "Prompt and response together; a longer response is cut, and the cuts counted.")
    skip_invalid_rows: bool = _option(False, "Leave invalid rows out and report them, instead of stopping.")

    beta: float = _option(0.1, "How strongly the reference holds the policy back.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "ipo_mean", "robust", "simpo"] = _option("sigmoid", "The pair loss.")
    label_smoothing: float = _option(0.0, "The share of labels taken to be flipped (cDPO; robust).")
    gamma: float = _option(0.5, "SimPO's target margin, in units of beta.")

    num_train_epochs: int = _option(1, "Passes over the data.")
    max_steps: int | None = _option(None, "Stop after so many optimizer steps, whatever num_train_epochs says.")
    batch_size: int = _option(64, "Pairs per optimizer step, over all processes and micro-batches together.")
    micro_batch_size: int = _option(8, "Pairs per forward pass; changes memory and speed, not the result.")
    optimizer: Literal["rmsprop", "adamw"] = _option("rmsprop", "The optimizer.")
    learning_rate: float = _option(1e-6, "The learning rate after the warm-up.")
    warmup_steps: int = _option(150, "Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = _option(0.0, "Decoupled for adamw, added to the gradient for rmsprop.")
    max_grad_norm: float = _option(10.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    precision: Literal["fp32", "bf16"] = _option("fp32", "bf16 computes in bfloat16, with fp32 master weights.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass to save memory.")
    seed: int = _option(42, "Seeds the shuffling.")

    ref_cache_dir: str | None = _option(None, "Reference log-probs are kept here; default: ~/.cache/rlhf_trainer.")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers of accelerate: tensorboard, wandb, trackio, ..."}
    )
    run_name: str = _option("rlhf-dpo", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        _at_least(self, 0, "beta", "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate", "seed")
        _at_least(self, 1, "num_train_epochs", "max_steps", "batch_size", "micro_batch_size", "eval_steps")
        _at_least(self, 1, "max_prompt_length")
        if self.max_length <= self.max_prompt_length:
            raise UsageError(
                f"max_length must leave room for a response: it must exceed "
                f"max_prompt_length={self.max_prompt_length}, got {self.max_length}"
            )


@dataclass
class DemoConfig:
    """Everything `rlhf demo` can be told."""

    output_dir: str = _option("demo_output", "Where models, preferences, metrics and the picture go.")
    overwrite: bool = _option(False, "Replace output_dir if it exists; without it, the next free name is used.")
    lm_steps: int = _option(400, "Steps of language modelling that make the starting model.")
    pairs: int = _option(4096, "Pairs of reviews to compare.")
    dpo_epochs: int = _option(3, "Passes over the pairs.")
    seed: int = _option(0, "Seeds everything.")

    def __post_init__(self) -> None:
        _at_least(self, 1, "lm_steps", "pairs", "dpo_epochs")


def _at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")


def parse_config(cls: type[Config], argv: Sequence[str], prog: str, description: str) -> Config:
    """Flags over the YAML file of `--config` over the defaults. Unknown keys and wrong types raise UsageError."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(cls, prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="A YAML file; each of its keys is a flag below.")
    given = _value_after(argv, "--config")
    if given is not None:
        values = load_yaml(cls, given)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    namespace = vars(parser.parse_args(list(argv)))
    namespace.pop("config")
    return cls(**namespace)


def load_yaml(cls: type, path: str) -> dict[str, Any]:
    """The keys and values of a YAML file, checked against the fields of `cls`."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold 'key: value' lines, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        raise UsageError(f"{path}: unknown key {', '.join(map(repr, unknown))}; the keys are: {', '.join(hints)}")
    return {key: checked_value(value, hints[key], f"{path}: key {key!r}") for key, value in values.items()}


def checked_value(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is of type `hint`, else UsageError. YAML reads 1e-6 as text, so text that is a number is one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UsageError(f"{where}: expected one of {', '.join(map(str, args))}; got {value!r}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return checked_value(value, hint, where)
    if origin is list:
        if isinstance(value, list):
            return [checked_value(item, args[0], where) for item in value]
        raise UsageError(f"{where}: expected a list of {args[0].__name__}, got {type(value).__name__} {value!r}")
    if hint is float and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:  # not isinstance: True is an int to Python, but not to a reader
        return value
    raise UsageError(f"{where}: expected {hint.__name__}, got {type(value).__name__} {value!r}")


def dump_yaml(config: Any) -> str:
    """The configuration as a YAML file that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _value_after(argv: Sequence[str], flag: str) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
        if word == flag:
            if i + 1 == len(argv):
                raise UsageError(f"{flag} needs a file name")
            return argv[i + 1]
    return None
