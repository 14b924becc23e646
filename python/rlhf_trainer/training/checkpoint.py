"""Checkpoints, from which a stopped run is resumed: weights, optimizer, step. Bit for bit, and verified when read.

A checkpoint is a folder, written beside its place, flushed to disk, and moved there whole. The two newest are kept, so
the last good one is there whenever the run dies, also while it writes the next. Its tensors are in the format of
torch.distributed.checkpoint: of a sharded run each process writes and reads its own part, whatever their number was.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ..errors import UsageError
from .files import beside, checksum, whole_folder
from .fsdp import reshard, sharding

FOLDER = "checkpoints"
STATE = "trainer_state.json"
KEPT = 2


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums are right. `state`: the JSON that the run saved with it."""

    folder: Path
    step: int
    state: dict[str, Any]


class Background:
    """Writes a checkpoint while training goes on, from a copy in the host's memory. Made in all processes."""

    def __init__(self) -> None:
        # The threads' messages are not to meet those of training.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1)
        self.under_way: Future[None] | None = None
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist means

    def save(self, states: dict[str, Any], checkpoint_id: Path, no_dist: bool) -> Future:
        return dcp.async_save(states, checkpoint_id=checkpoint_id, process_group=self.group, no_dist=no_dist)

    def wait(self) -> None:
        """Until what is under way has come to its end, well or not."""
        if self.under_way is not None:
            self.under_way.result()


def save_checkpoint(
    work: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
    background: Background | None = None,
) -> None:  # fmt: skip
    """Writes `work`/checkpoints/step-...; `state`: the rest that a resumed run needs, as JSON. Called in all processes,
    of which those write that have a part: all where the model is sharded, else the main one."""
    folder, processes, moved = work / FOLDER / name_of(step), PartialState(), ExitStack()
    with in_words(folder):
        if background is not None:
            background.wait()
        if processes.is_main_process:
            moved.enter_context(whole_folder(folder, flush=True))
        processes.wait_for_everyone()
        written = None
        if processes.is_main_process or sharding():
            way = dcp.save if background is None else background.save
            written = pass_tensors(way, states_of(model, optimizer), beside(folder))
        if background is not None:
            work_left = (commit, moved, written, folder, state) if processes.is_main_process else (wait_for, written)
            background.under_way = background.thread.submit(*work_left)
            return
        processes.wait_for_everyone()
        if processes.is_main_process:
            commit(moved, None, folder, state)
    processes.wait_for_everyone()


def commit(moved: ExitStack, written: Future | None, folder: Path, state: dict[str, Any]) -> None:
    """Moves a checkpoint into its place, where `moved` ends, with its facts, once all processes have written."""
    with in_words(folder), moved:
        wait_for(written)
        new = beside(folder)
        sums = {path.name: checksum(path) for path in sorted(new.iterdir())}
        facts = {"step": step_of(folder), "checksums": sums, **state}
        facts["checksum"] = checksum(json.dumps(facts).encode())
        (new / STATE).write_text(json.dumps(facts), encoding="utf-8")
        if folder.exists():  # damaged, or the run would have been resumed from it
            shutil.rmtree(folder)
    remove_earlier(folder)


def wait_for(written: Future | None) -> None:
    if written is not None:
        written.result()


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """A UsageError for what goes wrong where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        step = step_of(folder)
        raise UsageError(f"the checkpoint of step {step} cannot be saved in {folder.parent}: {error}") from error


def save_weights(folder: Path, model: nn.Module) -> None:
    """Writes what a run has changed of a model, in the place of what is there. Called in all processes."""
    processes = PartialState()
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait_for_everyone()
    if processes.is_main_process or sharding():
        pass_tensors(dcp.save, {"model": tensors_of(model)}, beside(folder))
    processes.wait_for_everyone()
    if processes.is_main_process:
        beside(folder).rename(folder)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Puts them back, in place."""
    pass_tensors(dcp.load, {"model": tensors_of(model)}, folder)


def pass_tensors(way: Callable[..., Any], states: dict[str, Any], folder: Path) -> Any:
    """Saves or loads, in place, by torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist means
        return way(states, checkpoint_id=folder, no_dist=sharding() is None)


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a run changes; an optimizer that has not stepped yet gets the state that it would have."""
    return {"model": tensors_of(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def remove_earlier(folder: Path) -> None:
    """Keeps KEPT checkpoints up to this one; later ones are damaged."""
    checkpoints = saved_checkpoints(folder.parent.parent)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint <= folder][-KEPT:]
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def newest_checkpoint(work: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `work`; for damaged ones, a warning."""
    for folder in reversed(saved_checkpoints(work)):
        state = whole_state(folder)
        if state is not None:
            return Checkpoint(folder, state["step"], state)
        warnings.warn(f"{folder} is damaged; an earlier checkpoint is taken", stacklevel=2)
    return None


def whole_state(folder: Path) -> dict[str, Any] | None:
    """The facts of a checkpoint; None where they, the weights or the optimizer are not those that were saved in this
    folder."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        own = state.pop("checksum")
        whole = own == checksum(json.dumps(state).encode()) and folder.name == name_of(state["step"])
        whole = whole and all(checksum(folder / name) == own for name, own in state["checksums"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not even facts
        return None
    return state if whole else None


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer back, in place."""
    states = states_of(model, optimizer)
    if not (checkpoint.folder / ".metadata").is_file():
        raise UsageError(f"{checkpoint.folder} is of an earlier version: begin anew with --overwrite_output_dir")
    saved = dcp.FileSystemReader(checkpoint.folder).read_metadata().state_dict_metadata
    sizes = {name: saved[f"model.{name}"].size for name in states["model"] if f"model.{name}" in saved}
    if sizes != {name: tensor.shape for name, tensor in states["model"].items()}:
        raise UsageError(f"{checkpoint.folder} is of another model, so --resume_from_checkpoint cannot go on with it")
    pass_tensors(dcp.load, states, checkpoint.folder)
    set_optimizer_state_dict(model, optimizer, states["optimizer"])


def remove_checkpoints(folder: Path, *, but_newest: bool) -> None:
    """Removes the checkpoints of a finished run, but perhaps the newest, from which a longer run goes on."""
    if not but_newest:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for checkpoint in saved_checkpoints(folder)[:-1]:
        shutil.rmtree(checkpoint)


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def saved_checkpoints(work: Path) -> list[Path]:
    """The folders of the checkpoints, the newest last."""
    return sorted((work / FOLDER).glob("step-*"))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes: parameters that train, and buffers, by name; tied ones once."""
    reshard(model)
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: tensor.detach() for name, tensor in [*trained, *model.named_buffers()]}
