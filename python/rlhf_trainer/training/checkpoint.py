"""Checkpoints, from which a stopped run is resumed: weights, optimizer, step. Bit for bit, and verified when read.

A checkpoint is a folder, written beside its place, flushed to disk, and moved there whole. The two newest are kept, so
the last good one is there whenever the run dies, also while it writes the next.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UsageError
from .files import checksum, whole_folder

FOLDER = "checkpoints"
STATE = "trainer_state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.pt"
KEPT = 2


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums are right. `state`: the JSON that the run saved with it."""

    folder: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(work: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes `work`/checkpoints/step-...; `state`: the rest that a resumed run needs, as JSON."""
    folder = work / FOLDER / name_of(step)
    try:
        _save(folder, step, model, optimizer, state)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError where the disk is full
        raise UsageError(f"the checkpoint of step {step} cannot be saved in {folder.parent}: {error}") from error


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    with whole_folder(folder, flush=True) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors_of(model).items()}, new / MODEL)
        torch.save(optimizer.state_dict()["state"], new / OPTIMIZER)  # of any types: eight bits, numbers
        sums = {name: checksum(new / name) for name in (MODEL, OPTIMIZER)}
        facts = {"step": step, "checksums": sums, **state}
        facts["checksum"] = checksum(json.dumps(facts).encode())
        (new / STATE).write_text(json.dumps(facts), encoding="utf-8")
        if folder.exists():  # damaged, or the run would have been resumed from it
            shutil.rmtree(folder)
    checkpoints = saved_checkpoints(folder.parent.parent)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint <= folder][-KEPT:]  # later ones are damaged
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
        whole = whole and all(checksum(folder / name) == state["checksums"][name] for name in (MODEL, OPTIMIZER))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not even facts
        return None
    return state if whole else None


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer back, in place."""
    tensors = tensors_of(model)
    saved = load_file(checkpoint.folder / MODEL)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UsageError(f"{checkpoint.folder} is of another model, so --resume_from_checkpoint cannot go on with it")
    for name, tensor in saved.items():
        tensors[name].copy_(tensor)
    state = torch.load(checkpoint.folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def remove_checkpoints(folder: Path, *, but_newest: bool) -> None:
    """Removes the checkpoints of a finished run, but perhaps the newest, from which a longer run goes on."""
    if not but_newest:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for checkpoint in saved_checkpoints(folder)[:-1]:
        shutil.rmtree(checkpoint)


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def saved_checkpoints(work: Path) -> list[Path]:
    """The folders of the checkpoints, the newest last."""
    return sorted((work / FOLDER).glob("step-*"))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes: parameters that train, and buffers, by name; tied ones once."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: tensor.detach() for name, tensor in [*trained, *model.named_buffers()]}
