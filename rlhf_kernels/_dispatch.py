"""`resolve_backend`: the one place that chooses which implementation runs; `ready_for_native` is its short cut."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import _extension, _triton

BACKENDS = ("auto", "reference", "native", "triton")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_warned: set[str] = set()


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `backend` can run on tensors of this device and GEMM dtype; otherwise the reason it cannot."""
    if backend == "reference":
        return None
    if backend == "triton":
        reason = _triton.why_not_on(device)
        return reason or _why_not_dtype("triton", dtype)
    return _why_not_native(device, dtype)


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Few steps on a CPU, where a loss of some hundred numbers takes as long as this does."""
    if not _extension.native_available():
        return _extension.why_not_native() or "the compiled extension is not loaded"
    if device.type != "cpu" and (reason := _extension.why_not_on(device)) is not None:
        return reason
    return None if dtype in _KERNEL_DTYPES else _why_not_dtype("native", dtype)


def _why_not_dtype(backend: str, dtype: torch.dtype) -> str | None:
    if dtype in _KERNEL_DTYPES:
        return None
    return f"{backend} computes in float32, bfloat16 or float16, not {dtype} (reference serves float64)"


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns "reference", "native" or "triton". An explicit backend that cannot run raises and lists those that can;
    "auto" takes native, else on a GPU triton, else the reference."""
    if backend == "auto":
        reason = _why_not_native(device, dtype)
        if reason is None:
            return "native"
        if device.type != "cpu":
            other = why_not("triton", device, dtype)
            if other is None:
                return "triton"
            reason = f"{reason}; and {other}"
        if dtype != torch.float64 and not torch.compiler.is_compiling():
            _warn_once(reason)
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    reason = why_not(backend, device, dtype)
    if reason is not None:
        able = [b for b in BACKENDS[1:] if why_not(b, device, dtype) is None]
        raise ValueError(f"backend={backend!r} cannot run here: {reason}. Backends that can: {', '.join(able)}")
    return backend


def ready_for_native(backend: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled op may have these as they are: on the CPU, of one shape and of one dtype that it takes.

    A loss of a few hundred numbers asks this first, as every step in Python counts there: the checks that say what is
    wrong, and the choice among all backends, take longer than the loss, and are for whoever is not ready."""
    dtype, shape = first.dtype, first.shape
    if (backend != "auto" and backend != "native") or dtype not in _KERNEL_DTYPES or not first.is_cpu:
        return False
    for other in others:
        if other is not None and not (other.is_cpu and other.dtype is dtype and other.shape == shape):
            return False
    return _extension.native_available()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"rlhf_kernels falls back to the slower reference backend: {reason}", stacklevel=4)


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the backends that can run on tensors of `device` and `dtype`, best last."""
    device = torch.device(device)
    return tuple(b for b in ("reference", "triton", "native") if why_not(b, device, dtype) is None)
