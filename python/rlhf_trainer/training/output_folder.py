"""Output folders: everything is written beside its place and moved there whole, so a folder that exists is complete."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import BinaryIO

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError

# Every run writes its configuration under this name first, so that a folder can be told to be a run's.
CONFIG_FILE = "rlhf_config.yaml"
# What may differ between a run and its resumption.
MAY_DIFFER = (
    "overwrite", "resume", "save_steps", "report_to", "run_name", "compare_with", "recipe", "set", "server_url",
    "server_timeout", "server_retries", "server_concurrency",
)  # fmt: skip


def partial_folder(output_dir: str | Path) -> Path:
    """Where a run works until it is done: a sibling, so that the final move is a rename within one file system."""
    output_dir = Path(output_dir).absolute()
    if not output_dir.name:
        raise UsageError(f"output_dir: expected a folder that can be made, got {output_dir}")
    return output_dir.with_name(output_dir.name + ".partial")


def check_free(output_dir: str | Path, overwrite: bool, resume: bool = False) -> None:
    """Raises UsageError if a run into `output_dir` would replace anything it may not replace."""
    output_dir, partial = Path(output_dir).absolute(), partial_folder(output_dir)
    if not is_taken(output_dir) and (resume or not partial.exists()):
        return
    if not overwrite:
        if is_taken(output_dir):
            raise UsageError(f"output_dir {output_dir} exists; choose another one, or pass --overwrite to replace it")
        raise UsageError(
            f"{partial} is there: a run into {output_dir} is going on, or stopped before its end (its metrics are in "
            "that folder). Pass --resume to go on with it, choose another output_dir, or pass --overwrite to delete "
            "what it left"
        )
    for folder in (output_dir, partial):
        if is_taken(folder) and not (folder / CONFIG_FILE).is_file():
            raise UsageError(
                f"{folder} is not the output of a run (it has no {CONFIG_FILE}), so --overwrite leaves it alone; "
                "choose another output_dir"
            )


def is_taken(path: Path) -> bool:
    """Whether there is anything at `path` but an empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def open_output(output_dir: str | Path, overwrite: bool, config_text: str, resume: bool = False) -> Path:
    """Makes the folder a run works in, locks it, and returns it; with `resume`, the one that a stopped run left, if
    any. What `output_dir` holds stays there until `commit_output`."""
    check_free(output_dir, overwrite, resume)
    partial = partial_folder(output_dir)
    try:
        if is_taken(partial):
            lock(partial)
            if resume:
                check_same_config(partial, config_text)
                return partial
        if partial.exists():
            shutil.rmtree(partial)
        beside = partial.with_name(f".{partial.name}")  # a folder of a run has its configuration from the start
        shutil.rmtree(beside, ignore_errors=True)  # of a run that died here
        beside.mkdir(parents=True)
        (beside / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        beside.rename(partial)  # fails if another run has just made it
    except OSError as error:
        raise UsageError(f"output_dir {output_dir} cannot be made: {error}") from error
    lock(partial)
    return partial


_locks: dict[Path, BinaryIO] = {}  # of this process, until its end or `commit_output`


def lock(partial: Path) -> None:
    """Raises UsageError if another process works in this folder."""
    if partial in _locks:  # of a run that was interrupted in this process
        _locks.pop(partial).close()
    handle = (partial / CONFIG_FILE).open("rb")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UsageError(
            f"another process is working in {partial}; wait for it, or choose another output_dir"
        ) from None
    _locks[partial] = handle


def is_finished(output_dir: str | Path, config_text: str, overwrite: bool = False) -> bool:
    """Whether the very run that is asked for has been here already. With `overwrite`, another run's output, or one that
    is being replaced, is not it."""
    folder = Path(output_dir)
    if not (folder / CONFIG_FILE).is_file():
        return False
    if overwrite and (partial_folder(folder).exists() or differences(folder, config_text)):
        return False
    check_same_config(folder, config_text)
    shutil.rmtree(replaced_folder(folder), ignore_errors=True)  # of a run that died while it replaced it
    return True


def check_same_config(folder: Path, config_text: str) -> None:
    """Raises UsageError unless the run that left `folder` was told the same, but for files and logs."""
    other = differences(folder, config_text)
    if other:
        raise UsageError(
            f"{folder} is of another run, so --resume cannot go on with it ({', '.join(other)}). Choose another "
            "output_dir, or pass --overwrite to replace it"
        )


def differences(folder: Path, config_text: str) -> list[str]:
    """What the run that left `folder` was told otherwise, key by key."""
    try:
        then, now = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")), yaml.safe_load(config_text)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{folder / CONFIG_FILE}: cannot tell what the run there was told: {error}") from error
    then = then if isinstance(then, dict) else {}
    keys = [key for key in {**then, **now} if key not in MAY_DIFFER and then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys]


def commit_output(output_dir: str | Path, overwrite: bool) -> Path:
    """Moves the finished folder into place; an old one is deleted only when the new one is there."""
    output_dir, partial = Path(output_dir).absolute(), partial_folder(output_dir)
    old = replaced_folder(output_dir)
    if is_taken(output_dir):
        if not overwrite:
            raise UsageError(f"output_dir {output_dir} appeared during the run; this run's output is in {partial}")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)
    if partial in _locks:
        _locks.pop(partial).close()
    return output_dir


def replaced_folder(output_dir: Path) -> Path:
    """Where an old output waits while the new one is moved into place."""
    return output_dir.with_name(output_dir.name + ".replaced")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. fp32: small updates do not survive bf16."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
