"""What a run needs to go on where it stopped: weights, optimizer, step. Bit for bit, and checked before it is believed.

A state is a folder, written beside its place, flushed to disk, and moved there whole. The two newest are kept, so the
last good one is there whenever the run dies, also while it writes the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UsageError

FOLDER = "state"
FACTS = "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
KEPT = 2


class Saved(NamedTuple):
    """A state that has been found whole."""

    folder: Path
    step: int
    facts: dict[str, Any]


def save_state(work: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    """Into `work`/state/step-...; `facts`: what else the run wants back, as JSON."""
    try:
        _save(work / FOLDER / f"step-{step:09d}", step, model, optimizer, facts)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the state of step {step} cannot be saved in {work / FOLDER}: {error}") from error


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that died here
    beside.mkdir(parents=True)
    for name, tensors in ((MODEL, tensors_of(model)), (OPTIMIZER, optimizer_tensors(optimizer))):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / name)
    sums = {name: _checksum(beside / name) for name in (MODEL, OPTIMIZER)}
    (beside / FACTS).write_text(json.dumps({"step": step, "checksums": sums, **facts}), encoding="utf-8")
    for path in (*beside.iterdir(), beside):
        _flush(path)
    if folder.exists():  # damaged, or it would have been gone on with
        shutil.rmtree(folder)
    beside.rename(folder)
    _flush(folder.parent)
    states = sorted(folder.parent.glob("step-*"))
    kept = [state for state in states if state <= folder][-KEPT:]  # later ones were found damaged
    for state in states:
        if state not in kept:
            shutil.rmtree(state)


def newest_state(work: Path) -> Saved | None:
    """The newest whole state in `work`; damaged ones are told and passed over."""
    for folder in sorted((work / FOLDER).glob("step-*"), reverse=True):
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            whole = all(_checksum(folder / name) == facts["checksums"][name] for name in (MODEL, OPTIMIZER))
        except (OSError, ValueError, KeyError):
            whole = False
        if whole:
            return Saved(folder, facts["step"], facts)
        warnings.warn(f"{folder} is damaged; an earlier state is taken", stacklevel=2)
    return None


def load_state(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer back, in place."""
    tensors = tensors_of(model)
    found = load_file(saved.folder / MODEL)
    if {name: tensor.shape for name, tensor in found.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UsageError(f"{saved.folder} is of another model, so --resume cannot go on with it")
    for name, tensor in found.items():
        tensors[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(saved.folder / OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def remove_state(work: Path) -> None:
    """Of a finished run, which has nothing to go on with."""
    shutil.rmtree(work / FOLDER, ignore_errors=True)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; what is tied, once."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entries in state.items() for key, value in entries.items()}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    """To the disk: without it a power cut can leave a folder in place whose files are empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
