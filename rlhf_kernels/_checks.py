"""Argument checks shared by every backend: each message states what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_same_device(**tensors: Tensor | None) -> None:
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
        raise ValueError(f"all tensors must be on one device, got {devices}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """hidden [..., D], weight [V, D], bias [V] or None."""
    check_floating(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})
    if hidden.dim() < 1:
        raise ValueError(f"{prefix}hidden must be [..., D], got a scalar")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"{prefix}weight must be [V, D] with V, D >= 1, got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden and {prefix}weight must share D: "
            f"got {prefix}hidden {tuple(hidden.shape)} and {prefix}weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_same_device(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})


def check_targets(targets: Tensor, hidden: Tensor, name: str = "targets") -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{name} must be {tuple(hidden.shape[:-1])} like hidden without D, got {tuple(targets.shape)}")
    check_same_device(hidden=hidden, **{name: targets})


def wrong_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))


def check_target_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Eager only: reads the values. Compiled graphs leave this to the op, which checks before it reads."""
    wrong = wrong_targets(targets, vocab_size, ignore_index)
    if bool(wrong.any()):
        first = targets[wrong][0].tolist()
        raise IndexError(f"target {first} is outside [0, {vocab_size}) and is not ignore_index ({ignore_index})")


def check_vectors(length: int | None = None, **tensors: Tensor | None) -> int:
    """Floating, on one device, and [length], or as long as the first one. Returns how long. In one pass: these checks
    are most of what a loss of a few hundred numbers costs."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            check_floating(**{name: tensor})
        shape = tensor.shape
        if len(shape) != 1 or (length is not None and shape[0] != length):
            raise ValueError(f"{name} must be [{'S' if length is None else length}], got {tuple(shape)}")
        length = shape[0]
        if device is not None and tensor.device != device:
            check_same_device(**tensors)
        device = tensor.device
    assert length is not None
    return length


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a == b else torch.promote_types(a, b)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
