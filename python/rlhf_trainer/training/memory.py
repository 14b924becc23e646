"""Memory that is given back in time, and one message where it runs out, of what ran and which options help."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError

LOWER = (
    "micro_batch_size", "per_device_generation_batch_size", "per_device_eval_batch_size", "max_length",
    "max_completion_length", "max_new_tokens", "workspace_mib",
)  # fmt: skip
TURN_ON = ("gradient_checkpointing", "bf16")
LARGE_BYTES = 64 << 20
CPU_MESSAGE = "DefaultCPUAllocator"  # torch raises a plain RuntimeError there


def give_back_freed_memory(model: nn.Module) -> None:
    """Makes glibc, which keeps freed blocks of up to 32 MiB, return them to the system where a backward pass reaches
    large embeddings: their gradient comes last, and a step's activations would still take memory beside it."""
    allocator = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(allocator, "malloc_trim"):
        return

    def trim(_gradient: Tensor) -> None:
        allocator.malloc_trim(0)

    def before_its_gradient(_embedding: nn.Module, _ids: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(trim)

    for part in model.modules():
        if isinstance(part, nn.Embedding) and part.weight.device.type == "cpu" and part.weight.nbytes >= LARGE_BYTES:
            part.register_forward_hook(before_its_gradient)


@contextmanager
def lack_of_memory(config: Any, describe: Callable[[], str]) -> Iterator[None]:
    """Turns the lack of memory, of a GPU or of the machine, into a TrainingError. `describe`: what ran, for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cuda = isinstance(error, torch.OutOfMemoryError)
        if not cuda and not isinstance(error, MemoryError) and CPU_MESSAGE not in str(error):
            raise
        numbers = [f"{name} ({value})" for name in LOWER if (value := getattr(config, name, None)) is not None]
        flags = [f"--{name}" for name in TURN_ON if getattr(config, name, None) is False]
        remedies = f"Lower {', '.join(numbers)}" if numbers else "Take smaller models"
        raise TrainingError(
            f"out of memory {'of the GPU' if cuda else 'of the machine'}: {describe()}. {remedies}"
            + (f", or pass {', '.join(flags)}" if flags else "")
            + (". With --dry_run it says what each part takes" if hasattr(config, "dry_run") else "")
        ) from error
