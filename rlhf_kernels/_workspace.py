"""The one knob that bounds scratch memory, for every backend."""

from __future__ import annotations

import torch

from . import _extension

_DEFAULT_MIB = {"cpu": 64, "cuda": 256}
_budget_mib: int | None = None


def set_workspace_budget(mebibytes: int | None) -> None:
    """Bounds the scratch memory of one call, cached logit tiles included.

    Args:
        mebibytes: whole number >= 8, or None for each kind of device's default: 64 on CPU, 256 on CUDA. A larger
            budget lets `linear_dpo_loss` keep its logits between forward and backward (three GEMMs instead of four)
            when all of them fit.

    Raises:
        TypeError, ValueError: not a whole number, or below 8.
    """
    global _budget_mib
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int | None):
        raise TypeError(f"mebibytes must be an int or None, got {type(mebibytes).__name__}")
    if mebibytes is not None and mebibytes < 8:
        raise ValueError(f"mebibytes must be >= 8, got {mebibytes}")
    _budget_mib = mebibytes
    if _extension.native_available():
        _extension.module().set_workspace_budget_mib(mebibytes or 0)


def workspace_budget_mib(device_type: str) -> int:
    return _budget_mib or _DEFAULT_MIB.get(device_type, _DEFAULT_MIB["cuda"])


def workspace_budget_bytes(device: torch.device) -> int:
    return workspace_budget_mib(device.type) << 20
