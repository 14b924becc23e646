"""Running out of memory: one message of what ran and which options help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import TrainingError

LOWER = (
    "micro_batch_size", "per_device_generation_batch_size", "per_device_eval_batch_size", "max_length",
    "max_completion_length", "max_new_tokens", "workspace_mib",
)  # fmt: skip
TURN_ON = ("gradient_checkpointing", "bf16")
CPU_MESSAGE = "DefaultCPUAllocator"  # torch raises a plain RuntimeError there


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
        ) from error
