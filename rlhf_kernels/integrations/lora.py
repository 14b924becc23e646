"""Adapters of peft on the LM head: which layer is in use, and the low-rank term as further columns of the head."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

Layer = Any  # a layer of peft, or not; peft is not imported here


def wrapped_head(head: Layer) -> Layer:
    """The layer that is called: of a head in `modules_to_save`, the trained copy, or the original where adapters are
    disabled or an active one has no copy (peft's own rule)."""
    if "peft.utils.other.ModulesToSaveWrapper" not in _peft_classes(head):
        return head
    copies, active = head.modules_to_save, head.active_adapters
    if head.disable_adapters or not active or any(name not in copies for name in active):
        return head.original_module
    return copies[active[0]]


def is_lora(head: Layer) -> bool:
    """Whether the layer is LoRA on a linear layer, and no more: what inherits from it may compute anything."""
    return _peft_classes(head)[:1] == ["peft.tuners.lora.layer.Linear"]


def check_lora(head: Layer) -> None:
    """Raises ValueError where an active adapter on the head is more than a low-rank term."""
    for name in _active(head, head.lora_A):
        if name in head.lora_variant:
            raise ValueError(
                f"adapter {name!r} on the LM head is a {type(head.lora_variant[name]).__name__}, which is more than a "
                "low-rank term: leave the head out of target_modules, or merge it (merge_and_unload)"
            )
        if head.lora_bias[name]:
            raise ValueError(f"adapter {name!r} on the LM head has lora_bias=True, which is not supported there")


def head_with_lora(head: Layer, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [..., D], weight [V, D] of the base layer -> [..., D + r] and [V, D + r], the adapted layer's operands.

        (W + s B A) x = [W, B] [x; s A x]

    The low-rank term is exact, gradients to A and B included; `[W, B]` is a copy of the head, made at each call, and a
    gradient of its whole shape is computed of which the last r columns are used. What is not of this form raises, as
    `check_lora` says.
    """
    check_lora(head)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as peft's own forward does, in place
    columns, rows = [hidden], [weight]
    active = [] if head.disable_adapters or head.merged else _active(head, head.lora_A)
    for name in active:
        down, up = head.lora_A[name], head.lora_B[name]
        x = down(head.lora_dropout[name](hidden.to(down.weight.dtype)))
        columns.append((x * head.scaling[name]).to(hidden.dtype))
        rows.append(up.weight.to(weight.dtype))
    return (torch.cat(columns, -1), torch.cat(rows, -1)) if len(rows) > 1 else (hidden, weight)


def _active(head: Layer, adapters: Container[str]) -> list[str]:
    return [name for name in head.active_adapters if name in adapters]


def _peft_classes(head: Layer) -> list[str]:
    """The classes of peft that the layer is of, the most derived one first; FSDP2 puts a class of its own before."""
    return [f"{cls.__module__}.{cls.__name__}" for cls in type(head).__mro__ if cls.__module__.startswith("peft.")]
