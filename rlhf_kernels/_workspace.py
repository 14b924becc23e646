"""The one knob that bounds scratch memory, for every backend."""

from __future__ import annotations

from . import _extension

_DEFAULT_CPU_MIB = 64
_reference_budget_mib = _DEFAULT_CPU_MIB


def set_workspace_budget(mebibytes: int) -> None:
    """Bounds the scratch memory of one call, cached logit tiles included.

    Args:
        mebibytes: whole number >= 8. The default is 64 on CPU. A larger budget lets `linear_dpo_loss` keep its
            logits between forward and backward (three GEMMs instead of four) when all of them fit.

    Raises:
        TypeError, ValueError: not a whole number, or below 8.
    """
    global _reference_budget_mib
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int):
        raise TypeError(f"mebibytes must be an int, got {type(mebibytes).__name__}")
    if mebibytes < 8:
        raise ValueError(f"mebibytes must be >= 8, got {mebibytes}")
    _reference_budget_mib = mebibytes
    if _extension.native_available():
        _extension.module().set_workspace_budget_mib(mebibytes)


def workspace_budget_bytes() -> int:
    return _reference_budget_mib << 20
