"""Reading a configuration: the flags of a command over the YAML file of `--config` over the defaults."""

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from ..errors import UNREADABLE, UsageError, did_you_mean
from .base import SUBJECTS

Config = TypeVar("Config")
# Names of TRL and transformers for which there is another one here: docs/trainer.md, "Coming from TRL".
COUNTERPARTS = {
    "per_device_train_batch_size": "micro_batch_size", "gradient_accumulation_steps": "batch_size",
    "lr": "learning_rate", "fp16": "bf16", "precision": "bf16", "kl_coef": "beta", "simpo_gamma": "gamma_beta_ratio",
    "max_new_tokens": "max_completion_length", "response_length": "max_completion_length",
    "steps_per_generation": "num_mini_batches", "generation_batch_size": "batch_size",
    "reward_model_path": "reward_model_name_or_path", "sft_model_path": "ref_model_name_or_path",
    "clip_range": "cliprange", "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "max_staleness": "max_off_policy_steps",
    "vllm_server_host": "vllm_server_base_url", "vllm_server_port": "vllm_server_base_url",
    "eval_split": "dataset_test_split",
    "chat_template": "chat_template_path", "torch_dtype": "dtype",
}  # fmt: skip


NO_DEFAULTS: dict[str, Any] = {}


def parse_config(
    cls: type[Config], argv: Sequence[str], prog: str, description: str, defaults: dict[str, Any] = NO_DEFAULTS
) -> Config:
    """Flags over the YAML file of `--config` over the defaults, to which `defaults` come for required fields. Unknown
    keys and wrong types raise UsageError."""
    parser = make_parser(cls, prog, description)
    argv = [_with_underscores(word) for word in argv]
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            known = [known.removeprefix("--") for known in parser._option_string_actions]
            parser.error(f"unknown flag {flag}{_suggestion(flag.removeprefix('--'), known, prefix='--')}")
    path = _value_after(argv, "--config")
    known_values = defaults | ({} if path is None else load_yaml(cls, path, prog))
    for action in parser._actions:
        action.required = action.required and action.dest not in known_values
    parser.set_defaults(**known_values)
    values = vars(parser.parse_args(argv))
    del values["config"]
    return cls(**values)


def make_parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    """A flag for every field of `cls`, grouped by subject. Errors are UsageErrors of two lines."""
    parser = argparse.ArgumentParser(prog, f"{prog} [--flag value ...]", description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="A YAML file; each of its keys is a flag below.")

    def error(message: str) -> NoReturn:
        raise UsageError(f"{message}\n`{prog} --help` lists the flags")

    parser.error = error
    hints = typing.get_type_hints(cls)
    fields = sorted(dataclasses.fields(cls), key=lambda field: not is_required(field))
    for subject in SUBJECTS:
        group = parser.add_argument_group(subject.title)
        for field in fields:
            if field.metadata["subject"] == subject.title:
                add_flag(group, field, hints[field.name])
    return parser


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    """The flag of a field: --flag VALUE; a bool's --flag alone means true, and --no_flag false, if true by default."""
    options: dict[str, Any] = {"help": field.metadata["help"], "required": is_required(field)}
    default = None if is_required(field) else default_of(field)
    options["default"] = default
    if options["required"]:
        options["help"] += " (required)"
    elif default is not None and default is not False and default != []:
        options["help"] += f" (default: {default})"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is Literal:
        options |= {"choices": typing.get_args(hint), "type": functools.partial(one_of, typing.get_args(hint))}
    elif typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        options |= {"type": item, "nargs": "+", "action": field.metadata["action"], "metavar": item.__name__.upper()}
    elif hint is bool:
        options |= {"type": true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        options |= {"type": hint, "metavar": hint.__name__.upper()}
    group.add_argument(f"--{field.name}", **options)
    if default is True:
        group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=f"{field.name} false.")


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    counterpart = COUNTERPARTS.get(name)
    return f"; did you mean {prefix + counterpart!r}?" if counterpart in known else did_you_mean(name, known, prefix)


def one_of(known: Sequence[str], text: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}; got {text!r}{did_you_mean(text, known)}")
    return text


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _with_underscores(word: str) -> str:
    """--some-flag=value as --some_flag=value."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a duplicate key is an error: its first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = [key for i, key in enumerate(keys) if key in keys[:i]]
        if duplicates:
            raise yaml.YAMLError(f"duplicate key {duplicates[0]!r}, the second time in{node.start_mark}")
        return super().construct_mapping(node, deep)


def load_yaml(cls: type, path: str, prog: str) -> dict[str, Any]:
    """The keys and values of a YAML file, checked against the fields of `cls`."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold 'key: value' lines, got {type(values).__name__}")
    return checked_values(cls, values, path, prog)


def checked_values(cls: type, values: dict[str, Any], where: str, command: str) -> dict[str, Any]:
    """`values` checked against the fields of `cls`, by name and type; not all need be there."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UsageError(
                f"{where}: unknown key {key!r}{_suggestion(str(key), hints)}\n`{command} --help` lists the keys"
            )
    return {key: checked_value(value, hints[key], f"{where}: key {key!r}") for key, value in values.items()}


def checked_value(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is of type `hint`, else UsageError. YAML reads 1e-6 as text, so text that is a number is one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        known = list(map(str, args))
        raise UsageError(f"{where}: expected one of {', '.join(known)}; got {value!r}{did_you_mean(str(value), known)}")
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
        except (ValueError, OverflowError):
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
