"""Recipes as files: stages in order, read, filled in and checked as a whole before the first of them runs.

    title: ...
    source: ...                 # the paper
    variables:                  # changed by --set name=value; null: has to be set
      base: ...
    stages:
      sft: {command: sft, model_name_or_path: "${base}", dataset: ...}       # a command of `rlhf` with its own keys
      pick: {python: "module:function", options: {model: "${sft}"}}          # called as function(folder, model=...)

`${name}` is a variable, the folder of an earlier stage, or, as `${output}`, the folder that holds all of them.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..commands import COMMANDS
from ..config.base import FolderConfig, OutputConfig, names_with
from ..config.functions import import_function
from ..config.parse import UniqueKeys, checked_values, is_required
from ..errors import UNREADABLE, UsageError, did_you_mean

SHIPPED = Path(__file__).parent
OUTPUT = "output"
KEYS = ("title", "source", "threads", "variables", "stages")
KEYS_OF_RECIPE = tuple(field.name for field in dataclasses.fields(FolderConfig))  # no stage may have them
NOTHING: dict[str, str] = {}
REFERENCE = re.compile(r"\$\{([^{}]*)\}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Stage(NamedTuple):
    """A stage as it was read. `options` hold values for variables, but still name other stages as ${name}: those move
    when all is done."""

    name: str
    kind: str  # "command" or "python"
    what: str  # the command, or module:function
    options: dict[str, Any]
    where: str  # "recipe zephyr, stage sft": for messages

    @property
    def content(self) -> dict[str, Any]:
        """The stage as it stands in a file."""
        if self.kind == "python":
            return {"python": self.what, "options": self.options}
        return {"command": self.what, **self.options}


class Recipe(NamedTuple):
    title: str
    source: str
    threads: int | None  # torch's; None: torch's choice
    stages: list[Stage]

    def text(self) -> str:
        """A recipe that does the same: what this one does whatever its variables or its file become."""
        stages = {stage.name: stage.content for stage in self.stages}
        content = {"title": self.title, "source": self.source, "threads": self.threads, "stages": stages}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a path; `changes`: variable=value, or stage.key=value. UsageError names recipe,
    stage and key of what is wrong."""
    path = SHIPPED / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    where = f"recipe {name}"
    content = load(path, where)
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(map(repr, unknown))}; the keys are: {', '.join(KEYS)}")
    variables, stages = (mapping(content.get(key), f"{where}: {key}") for key in ("variables", "stages"))
    if not stages:
        raise UsageError(f"{where}: stages: there is none; name at least one")
    for stage, keys in stages.items():
        if not NAME.fullmatch(str(stage)) or stage in (OUTPUT, *variables):
            raise UsageError(
                f"{where}: {stage!r} cannot name a stage: expected letters, digits, - and _, and not the name of a "
                f"variable or {OUTPUT!r}"
            )
        mapping(keys, f"{where}, stage {stage}")
    apply(changes, variables, stages, where)
    values = filled_variables(variables, where)
    threads = content.get("threads")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise UsageError(f"{where}: threads: expected a whole number above 0, got {threads!r}")
    read = [read_stage(str(stage), stages, values, f"{where}, stage {stage}") for stage in stages]
    return Recipe(str(content.get("title", name)), str(content.get("source", "")), threads, read)


def load(path: Path, where: str) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except FileNotFoundError as error:
        raise UsageError(
            f"{where}: neither a file nor a recipe that is shipped; those are: {', '.join(shipped_recipes())}"
        ) from error
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UsageError(f"{where}: {path} is not YAML: {error}") from error
    return mapping(content, where)


def mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected 'key: value' lines, got {type(value).__name__} {value!r}")
    return value


def apply(changes: Sequence[str], variables: dict[str, Any], stages: dict[str, Any], where: str) -> None:
    """variable=value and stage.key=value, the values as YAML, into both mappings."""
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: expected name=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, *UNREADABLE) as error:
            raise UsageError(f"--set {change}: the value is not YAML: {error}") from error
        stage, dot, key = name.partition(".")
        if dot and stage in stages:
            options = stages[stage]
            (options.setdefault("options", {}) if "python" in options else options)[key] = value
        elif name in variables:
            variables[name] = value
        else:
            raise UsageError(
                f"--set {change}: {where} has no variable {name!r}; its variables are: {', '.join(variables) or 'none'}"
                f"; a key of a stage is set by stage.key=value, its stages are: {', '.join(map(str, stages))}"
            )


def filled_variables(variables: dict[str, Any], where: str) -> dict[str, Any]:
    """Every variable's value, which may name variables above it."""
    values: dict[str, Any] = {}
    for name, value in variables.items():
        if value is None:
            raise UsageError(f"{where}: variable {name!r} has no value: pass --set {name}=...")
        values[name] = filled(value, finder(values, f"{where}, variable {name}"))
    return values


def read_stage(name: str, stages: Mapping[str, Any], variables: dict[str, Any], where: str) -> Stage:
    content = dict(stages[name])
    commands = [name for name, command in COMMANDS.items() if issubclass(command.load_config(), OutputConfig)]
    kinds = [kind for kind in ("command", "python") if kind in content]
    if len(kinds) != 1:
        raise UsageError(
            f"{where}: expected either command, one of {', '.join(commands)}, or python, a module:function, and its "
            f"keys; got the keys {', '.join(map(str, content)) or 'none'}"
        )
    (kind,) = kinds
    what = content.pop(kind)
    if kind == "command" and what not in commands:
        raise UsageError(
            f"{where}: unknown command {what!r}{did_you_mean(str(what), commands)}; "
            f"the commands are: {', '.join(commands)}"
        )
    if kind == "python":
        other = [str(key) for key in content if key != "options"]
        if other:
            raise UsageError(f"{where}: unknown key {', '.join(map(repr, other))} beside python; give it as options")
        content = mapping(content.get("options"), f"{where}: options")
    forbidden = [key for key in KEYS_OF_RECIPE if key in content]
    if forbidden:
        raise UsageError(f"{where}: key {forbidden[0]!r} is the recipe's: pass --{forbidden[0]} to rlhf recipe")
    place = list(stages).index(name)
    known = variables | {stage: f"${{{stage}}}" for stage in (*list(stages)[:place], OUTPUT)}
    refused = {stage: "comes later" for stage in list(stages)[place:]} | {name: "is this very stage"}
    options = {
        str(key): filled(value, finder(known, f"{where}: key {key!r}", refused)) for key, value in content.items()
    }
    return Stage(name, kind, what, options, where)


def finder(known: Mapping[str, Any], where: str, refused: Mapping[str, str] = NOTHING) -> Callable[[str], Any]:
    """The function name -> value; UsageError for a name without one, which says why it is refused, or what is known."""

    def find(name: str) -> Any:
        if name in known:
            return known[name]
        if name in refused:
            raise UsageError(f"{where}: ${{{name}}} {refused[name]}, so there is nothing to take from it yet")
        raise UsageError(f"{where}: ${{{name}}} is no variable or earlier stage; those are: {', '.join(known)}")

    return find


def filled(value: Any, find: Callable[[str], Any]) -> Any:
    """`value` with every ${name} in it replaced; one that is nothing but ${name} takes its value, whatever type."""
    if isinstance(value, dict):
        return {key: filled(item, find) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, find) for item in value]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    return find(whole[1]) if whole else REFERENCE.sub(lambda match: str(find(match[1])), value)


def placed(stage: Stage, folder: Path) -> dict[str, Any]:
    """The stage's options, where all stages' folders lie in `folder`."""
    return filled(stage.options, lambda name: str(folder if name == OUTPUT else folder / name))


def config_of(stage: Stage, folder: Path) -> OutputConfig:
    """A command's configuration, where all stages' folders lie in `folder`; UsageError for what it would refuse."""
    cls = COMMANDS[stage.what].load_config()
    values = checked_values(cls, placed(stage, folder), stage.where, f"rlhf {stage.what}")
    values |= {"output_dir": str(folder / stage.name), "resume_from_checkpoint": True}
    missing = [field.name for field in dataclasses.fields(cls) if is_required(field) and field.name not in values]
    if missing:
        raise UsageError(f"{stage.where}: missing, but needed by {stage.what}: {', '.join(missing)}")
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{stage.where}: {error}") from error


def function_of(stage: Stage) -> Callable[..., object]:
    """The function of a stage of the user's own; UsageError where it is not there or does not take the options."""
    function = import_function(stage.what, f"{stage.where}: python")
    try:
        inspect.signature(function).bind(Path(), **stage.options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{stage.where}: python {stage.what!r} cannot be called with its options: {error}") from error
    return function


def check_recipe(recipe: Recipe, output_dir: Path) -> None:
    """UsageError for whatever of a stage can be known to be wrong before the first one runs."""
    for stage in recipe.stages:
        if stage.kind == "python":
            function_of(stage)
            continue
        config = config_of(stage, output_dir)
        for key in names_with(type(config), "names_input"):
            value = stage.options.get(key)
            for name in value if isinstance(value, list) else [value]:
                is_path = isinstance(name, str) and (
                    name.startswith(("/", ".")) or name.endswith((".jsonl", ".json", ".csv", ".parquet"))
                )
                if is_path and not REFERENCE.search(name) and not Path(name).exists():
                    raise UsageError(f"{stage.where}: key {key!r}: no such file or folder: {name}")
