"""Reading a configuration: the flags of a command over the YAML file of `--config` over the defaults."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ..errors import UsageError

Config = TypeVar("Config")


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
    return checked_values(cls, values, path)


def checked_values(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` checked against the fields of `cls`, by name and type; not all need be there."""
    hints = typing.get_type_hints(cls)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(map(repr, unknown))}; the keys are: {', '.join(hints)}")
    return {key: checked_value(value, hints[key], f"{where}: key {key!r}") for key, value in values.items()}


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
