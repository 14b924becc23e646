"""Loads the compiled part, `rlhf_kernels._C`, or states why it cannot be used.

The build leaves `_build_report.json` beside this file. It is read before `_C` is, because an extension compiled against
another torch would at best end in an undefined symbol: one that does not fit is not loaded, and the reason is kept.
"""

import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall .   (in the source directory)"


def _read_report() -> dict[str, Any]:
    path = Path(__file__).with_name("_build_report.json")
    try:
        report: dict[str, Any] = dict(json.loads(path.read_text()))
        if not isinstance(report.get("native"), bool):
            raise ValueError("it does not say whether anything was compiled")
    except FileNotFoundError:
        return {"native": False, "native_reason": f"nothing was compiled here yet; run: {_REBUILD}"}
    except (ValueError, TypeError, RecursionError) as error:
        return {"native": False, "native_reason": f"{path} is damaged ({error}); run: {_REBUILD}"}
    return report


def _abi(version: str | None) -> str | None:
    """The part of a version that decides whether compiled code fits: 2.13 of 2.13.1+cpu, but all of a nightly."""
    if version is None or "dev" in version or "git" in version:
        return version
    return ".".join(version.split(".")[:2])


def _misfit(report: dict[str, Any]) -> str | None:
    built, cuda_built, python = report.get("torch"), report.get("torch_cuda"), report.get("python")
    if _abi(built) != _abi(torch.__version__):
        return f"it was compiled against torch {built}, and torch {torch.__version__} is running"
    # Without CUDA the extension touches nothing in which torch's CPU and CUDA builds differ.
    if report.get("cuda") and _abi(cuda_built) != _abi(torch.version.cuda):
        running = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return f"it was compiled for CUDA {cuda_built}, and the torch that is running has {running}"
    if python != sys.implementation.cache_tag:
        return f"it was compiled for {python}, and {sys.implementation.cache_tag} is running"
    return None


def _load(report: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """The loaded extension, or None and why. Silent where it was never built, a warning where it was and is no use."""
    if not report["native"]:
        errors = [line.strip()[:200] for line in report.get("compiler_output", []) if "error" in line]
        return None, ": ".join([str(report["native_reason"]), *errors[:1]])
    reason = _misfit(report)
    if reason is None:
        try:
            return importlib.import_module(f"{__package__}._C"), None  # registers the torch.ops.rlhf_kernels
        except ImportError as error:
            reason = f"the loader refused it ({error})"
    reason = f"{reason}; rebuild it: {_REBUILD}"
    warnings.warn(f"rlhf_kernels runs without its compiled part: {reason}", RuntimeWarning, stacklevel=3)
    return None, reason


_report = _read_report()
_native, _native_reason = _load(_report)


def native_available() -> bool:
    return _native is not None


def native_has_cuda() -> bool:
    return _native is not None and bool(_native.has_cuda())


def why_not_on(device: torch.device) -> str | None:
    """Why the compiled part, which is there, has no kernels for tensors of this device; None when it has."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not native_has_cuda():
        return f"the compiled extension has no kernels for {device.type} tensors"
    if torch.compiler.is_compiling():  # a device's properties are not to be traced
        return None
    arches = re.findall(r"(\d+)\.(\d+)", _report.get("cuda_arches") or "")
    oldest = min(((int(major), int(minor)) for major, minor in arches), default=(0, 0))
    capability = torch.cuda.get_device_capability(device)
    if capability >= oldest:
        return None
    return (
        f"its CUDA kernels were compiled for compute capability {oldest[0]}.{oldest[1]} and newer, and this GPU has "
        f"{capability[0]}.{capability[1]} (TORCH_CUDA_ARCH_LIST chooses when it is compiled)"
    )


def why_not_native() -> str | None:
    """The reason why the compiled part is not there; None when it is."""
    return _native_reason


def build_report() -> dict[str, Any]:
    """The report that the build left."""
    return _report


def module() -> ModuleType:
    """`rlhf_kernels._C`; only to be called where `native_available()`."""
    if _native is None:
        raise RuntimeError(f"the compiled part of rlhf_kernels is not there: {_native_reason}")
    return _native
