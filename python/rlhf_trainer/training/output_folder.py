"""Output folders: everything is written beside its place and moved there whole, so a folder that exists is complete."""

import fcntl
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from accelerate.utils import broadcast_object_list

from ..config.base import FolderConfig, names_with
from ..config.parse import dump_yaml
from ..errors import UNREADABLE, UsageError
from .checkpoint import remove_checkpoints, saved_checkpoints, step_of
from .files import whole_folder, write_whole

# Every run writes its configuration under this name first, so that a run's folder can be recognised.
CONFIG_FILE = "rlhf_config.yaml"
NAME_BYTES = 200  # of output_dir: names of files may have 255, and those beside it are longer
LENGTHS = ("num_train_epochs", "max_steps")


def partial_folder(output_dir: str | Path) -> Path:
    """The folder that a run works in until it is done: a sibling of output_dir, so that the final move is a rename."""
    output_dir = Path(output_dir).absolute()
    if not 0 < len(os.fsencode(output_dir.name)) <= NAME_BYTES or "\0" in str(output_dir):
        raise UsageError(
            f"output_dir: expected a folder that can be made (a name of 1 to {NAME_BYTES} bytes), got {output_dir}"
        )
    return output_dir.with_name(output_dir.name + ".partial")


def check_free(config: FolderConfig) -> None:
    """Raises UsageError if a run into output_dir would replace anything it may not replace."""
    output_dir, partial = Path(config.output_dir).absolute(), partial_folder(config.output_dir)
    if not is_taken(output_dir) and (config.resume_from_checkpoint or not partial.exists()):
        return
    if not config.overwrite_output_dir:
        if is_taken(output_dir):
            raise UsageError(
                f"output_dir {output_dir} exists; choose another one, or pass --overwrite_output_dir to replace it"
            )
        raise UsageError(
            f"{partial} is there: a run into {output_dir} is going on, or stopped before its end (its metrics are in "
            "that folder). Pass --resume_from_checkpoint to go on with it, choose another output_dir, or pass "
            "--overwrite_output_dir to delete what it left"
        )
    check_replaceable(output_dir)
    check_replaceable(partial)


def check_replaceable(folder: Path) -> None:
    """Raises UsageError unless `folder` is free or a run's, which may be replaced."""
    if is_taken(folder) and not (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"{folder} is not the output of a run (it has no {CONFIG_FILE}), so --overwrite_output_dir leaves it "
            "alone; choose another output_dir"
        )


def is_taken(path: Path) -> bool:
    """Whether there is anything at `path` but an empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def open_output(config: FolderConfig, steps: int = 0) -> Path:
    """Makes the folder that a run works in, locks it, and returns it; a resumed run gets the one that it left, if any.
    The content of output_dir stays there until `commit_output`, but where a finished run goes on, to `steps`: its
    folder is worked in again."""
    output_dir, partial = Path(config.output_dir).absolute(), partial_folder(config.output_dir)
    longer = goes_on(config)
    checkpoints = saved_checkpoints(output_dir if longer else partial) if config.resume_from_checkpoint else []
    done = max(map(step_of, checkpoints), default=0)
    if steps < done:
        raise UsageError(f"{output_dir} has trained for {done} steps already: raise num_train_epochs or max_steps")
    if longer:
        output_dir.rename(partial)
    check_free(config)
    try:
        if is_taken(partial):
            lock(partial)
            if config.resume_from_checkpoint:
                check_same_config(partial, config)
                write_whole(partial / CONFIG_FILE, dump_yaml(config))  # it may be longer now
                lock(partial)
                return partial
        if partial.exists():
            shutil.rmtree(partial)
        with whole_folder(partial) as folder:  # fails if another run has just made it
            (folder / CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"output_dir {config.output_dir} cannot be made: {error}") from error
    lock(partial)
    return partial


_locks: dict[Path, BinaryIO] = {}  # of this process, until its end or `commit_output`


def lock(partial: Path) -> None:
    """Raises UsageError if another process works in this folder."""
    if partial in _locks:  # a run was interrupted in this process
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


def already_finished(config: FolderConfig) -> bool:
    """Whether the run to be resumed has come to its end before. With overwrite_output_dir the output of another run,
    or one that is being replaced, does not count."""
    folder = Path(config.output_dir)
    if not config.resume_from_checkpoint or not (folder / CONFIG_FILE).is_file():
        return False
    if config.overwrite_output_dir and (partial_folder(folder).exists() or differences(folder, config)):
        return False
    check_same_config(folder, config)
    shutil.rmtree(replaced_folder(folder), ignore_errors=True)  # of a run that died while it replaced it
    return not goes_on(config)


def goes_on(config: FolderConfig) -> bool:
    """Whether the run in output_dir is finished, and is to be resumed with another length."""
    folder = Path(config.output_dir)
    if not config.resume_from_checkpoint or not (folder / CONFIG_FILE).is_file() or partial_folder(folder).exists():
        return False
    then = read_config(folder)
    if differences(folder, config) or all(then.get(n) == getattr(config, n) for n in LENGTHS if hasattr(config, n)):
        return False
    if not saved_checkpoints(folder):
        raise UsageError(
            f"{folder} is finished and has no optimizer state (save_only_model), so that its training cannot be made "
            f"longer. Start a new one from it: --model_name_or_path {folder}, with another output_dir"
        )
    return True


def begin(config: FolderConfig, is_main_process: bool = True) -> bool:
    """Whether there is anything to do: False, with a line printed, where the run is finished already; UsageError where
    output_dir is not free."""
    if getattr(config, "chat_template_date", "") is None:
        config.chat_template_date = first_date(config)
    if already_finished(config):
        if is_main_process:
            keep_checkpoints(config)  # the run may have died between its end and their removal
            print(f"{config.output_dir}: already finished")
        return False
    if is_main_process and not goes_on(config):
        check_free(config)
    return True


def first_date(config: FolderConfig) -> str:
    """The date of the run that is resumed, so that templates which write it render as they did; else the present, the
    same in all processes."""
    for folder in (partial_folder(config.output_dir), Path(config.output_dir)):
        if config.resume_from_checkpoint and (folder / CONFIG_FILE).is_file():
            date = read_config(folder).get("chat_template_date")
            if date is not None:
                return str(date)
    return broadcast_object_list([datetime.now().isoformat(timespec="seconds")])[0]


def keep_checkpoints(config: FolderConfig) -> None:
    """Leaves a finished run's last checkpoint, or none, as the configuration wants it."""
    remove_checkpoints(Path(config.output_dir), but_newest=not getattr(config, "save_only_model", True))


def check_same_config(folder: Path, config: FolderConfig) -> None:
    """Raises UsageError unless the run that left `folder` had the same configuration, but for what may change."""
    differing = differences(folder, config)
    if differing:
        raise UsageError(
            f"{folder} is of another run, so --resume_from_checkpoint cannot go on with it ({', '.join(differing)}). "
            "Choose another output_dir, or pass --overwrite_output_dir to replace it"
        )


def differences(folder: Path, config: FolderConfig) -> list[str]:
    """The options whose values differ from those of the run that left `folder`, with both values."""
    then, now = read_config(folder), yaml.safe_load(dump_yaml(config))
    may_change = names_with(type(config), "may_change")
    keys = [key for key in {**then, **now} if key not in may_change and then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys]


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run that left `folder`."""
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UsageError(f"{folder / CONFIG_FILE}: cannot read the configuration of the run there: {error}") from error
    return values if isinstance(values, dict) else {}


def commit_output(config: FolderConfig) -> Path:
    """Moves the finished folder into place; an old one is deleted only when the new one is there."""
    output_dir, partial = Path(config.output_dir).absolute(), partial_folder(config.output_dir)
    old = replaced_folder(output_dir)
    if is_taken(output_dir):
        if not config.overwrite_output_dir:
            raise UsageError(f"output_dir {output_dir} appeared during the run; this run's output is in {partial}")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)
    if partial in _locks:
        _locks.pop(partial).close()
    return output_dir


def replaced_folder(output_dir: Path) -> Path:
    """The place of an old output while the new one is moved into its own."""
    return output_dir.with_name(output_dir.name + ".replaced")
