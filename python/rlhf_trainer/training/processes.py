"""The processes that `torchrun` or `accelerate launch` started: sharing work among them, and leaving them."""

import gc
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ..errors import UsageError

Part, Result = TypeVar("Part"), TypeVar("Result")


def single_process(command: str) -> torch.device:
    """The device of a command that works in one process; UsageError where it was launched in several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UsageError(
            f"{command} works in one process and was launched in {world}: start it without accelerate launch or "
            "torchrun. To use several devices, give each its own part of the data and its own output_dir"
        )
    return PartialState().device


def leave_processes() -> None:
    """Ends the group of processes, if there is one. Call it last, where no model is held any more.

    gloo's threads hold the tensors of a collective a moment longer than the call. One that lets go of them after Python
    has ended aborts the process, after all its work is done (pytorch/pytorch#179291); destroying the group, while
    nothing else holds it, waits for them.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a wrapped model holds the group, and is itself held by cycles
        dist.destroy_process_group()


def over_processes(
    parts: Sequence[Part], work: Callable[[Part], Result], accelerator: Accelerator, *, in_step: bool = False
) -> list[Result]:
    """The results of `work` on each part, in their order, in every process; each process does its share of the work.
    With `in_step` all work as often, as sharded models want it; results of too much work are dropped."""
    rank, world = accelerator.process_index, accelerator.num_processes
    done = [(k, work(parts[k])) for k in range(rank, len(parts), world)]
    if in_step and len(parts) % world and rank >= len(parts) % world:
        work(parts[-1])
    everyone = gather_object(done) if world > 1 else done
    return [result for _, result in sorted(everyone, key=lambda item: item[0])]
