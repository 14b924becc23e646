"""Leaving the processes that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave_processes() -> None:
    """Ends the group of processes, if there is one. Call it last, where no model is held any more.

    gloo's threads hold the tensors of a collective a moment longer than the call. One that lets go of them after Python
    has ended aborts the process, after all its work is done (pytorch/pytorch#179291); destroying the group, while
    nothing else holds it, waits for them.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a wrapped model holds the group, and is itself held by cycles
        dist.destroy_process_group()
