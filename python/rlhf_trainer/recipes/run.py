"""`rlhf recipe`: the stages of one YAML file in order, each consuming what earlier ones left, ending in one report.

A stage is a command of `rlhf` or a function of the user's own (file.py says how they are written). The whole
recipe is checked before its first stage runs. The stages run in one process, each in output_dir/STAGE, and each goes on
where it was interrupted; so a run of a recipe does, too: stages that are done are left alone.
"""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..commands import COMMANDS
from ..errors import TrainingError, UsageError
from ..training.files import write_whole
from ..training.output_folder import CONFIG_FILE, begin, commit_output, is_taken, open_output, partial_folder
from ..training.processes import single_process
from .config import FunctionConfig, RecipeConfig
from .file import Recipe, Stage, check_recipe, config_of, function_of, placed, read_recipe
from .report import in_markdown, report_of

RECIPE_FILE, DONE_FILE = "recipe.yaml", "stages_done.json"


def run_recipe(config: RecipeConfig) -> Path:
    """Returns output_dir: a folder of each stage, the recipe as it was run, report.json and report.md."""
    recipe, folder = read_recipe(config.recipe, config.set), Path(config.output_dir).absolute()
    check_recipe(recipe, folder)
    if config.dry_run:
        print("\n".join(as_commands(recipe, folder)))
        return folder
    if config.resume_from_checkpoint and not partial_folder(folder).exists():
        check_same_stages(folder, recipe)  # before `begin` says that nothing is left to do
    single_process("rlhf recipe")
    if not begin(config):
        return folder
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)

    work = open_output(config)
    check_same_stages(work, recipe)
    write_whole(work / RECIPE_FILE, recipe.text())
    done: dict[str, Any] = json.loads((work / DONE_FILE).read_text()) if (work / DONE_FILE).exists() else {}
    for number, stage in enumerate(recipe.stages, start=1):
        title = f"stage {number} of {len(recipe.stages)}, {stage.name}"
        if stage.name in done:
            print(f"{title}: done")
            continue
        print(f"\n{title}: {stage.what}", flush=True)
        again, started = has_begun(work, stage.name), time.perf_counter()
        try:
            run_stage(stage, work)
        except (UsageError, TrainingError) as error:
            kept = f"What is done is kept in {work}: pass --resume_from_checkpoint to go on there"
            raise type(error)(f"{stage.where}: {error}\n{kept}") from error
        done[stage.name] = {"seconds": round(time.perf_counter() - started, 1), "resumed": again}
        write_whole(work / DONE_FILE, json.dumps(done))

    report = renamed(report_of(recipe, work, done), f"{work}/", "")  # its paths begin at output_dir
    write_whole(work / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(work / "report.md", in_markdown(report))
    # The stages' folders are about to move. Their configurations name the new places, for `rlhf` to read them again.
    for path in work.rglob(CONFIG_FILE):
        if path.parent != work:
            content = renamed(yaml.safe_load(path.read_text(encoding="utf-8")), str(work), str(folder))
            write_whole(path, yaml.safe_dump(content, sort_keys=False))
    commit_output(config)
    print(f"\n{in_markdown(report)}\nsaved to {folder}; this report is {folder / 'report.md'}")
    return folder


def run_stage(stage: Stage, work: Path) -> None:
    if stage.kind == "command":
        COMMANDS[stage.what].load_function()(config_of(stage, work))
    elif not (work / stage.name).exists():  # a function cannot be resumed, so it starts anew
        config = FunctionConfig(
            output_dir=str(work / stage.name), overwrite_output_dir=True, python=stage.what, options=placed(stage, work)
        )
        folder = open_output(config)
        try:
            function_of(stage)(folder, **config.options)
        except (UsageError, TrainingError):
            raise
        except Exception as error:
            error.add_note(
                f"{stage.where}: {stage.what} raised this. Mended, the recipe goes on with --resume_from_checkpoint"
            )
            raise
        commit_output(config)


def has_begun(work: Path, name: str) -> bool:
    return is_taken(work / name) or is_taken(partial_folder(work / name))


def check_same_stages(folder: Path, recipe: Recipe) -> None:
    """Raises UsageError if a stage that has begun in `folder` had other options. Those to come may be changed."""
    if not (folder / RECIPE_FILE).exists():
        return
    then = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))["stages"]
    now = {stage.name: stage.content for stage in recipe.stages}
    begun = [name for name in then if has_begun(folder, name)]
    if list(now)[: len(begun)] != begun:
        raise other_recipe(folder, f"it began with the stages {', '.join(begun)}, the recipe now has {', '.join(now)}")
    for name in begun:
        for key in {**then[name], **now[name]}:
            old, new = then[name].get(key), now[name].get(key)
            if old != new:
                raise other_recipe(folder, f"stage {name}: {key}: {old!r} then, {new!r} now")


def other_recipe(folder: Path, difference: str) -> UsageError:
    return UsageError(
        f"{folder} is of another recipe, so --resume_from_checkpoint cannot go on with it ({difference}). "
        "Only stages that have not begun may be changed; choose another output_dir, or pass --overwrite_output_dir "
        "without --resume_from_checkpoint to replace it"
    )


def as_commands(recipe: Recipe, folder: Path) -> list[str]:
    """The stages as commands, to be launched one by one; functions as a comment."""
    lines = [f"# {recipe.title} ({recipe.source})"]
    for stage in recipe.stages:
        if stage.kind == "python":
            lines.append(f"# {stage.what}({str(folder / stage.name)!r}, **{placed(stage, folder)})")
            continue
        words = ["rlhf", stage.what]
        for key, value in placed(stage, folder).items():
            if value is not None and value != []:
                words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        lines.append(shlex.join([*words, "--output_dir", str(folder / stage.name)]))
    return lines


def renamed(value: Any, old: str, new: str) -> Any:
    """`value`, of JSON, with `old` replaced in all its texts and keys."""
    if isinstance(value, dict):
        return {renamed(key, old, new): renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value
