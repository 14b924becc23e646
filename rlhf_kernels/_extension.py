"""Loads the compiled part, `rlhf_kernels._C`, and says plainly what was built and why something was not.

The build leaves `_build_report.json` beside this file. It is read before `_C` is, because an extension compiled against
another torch would at best end in an undefined symbol: what does not fit is not loaded, and told in words.
"""

import importlib
import json
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall .   (in the source directory)"


def _read_report() -> dict[str, Any]:
    path = Path(__file__).with_name("_build_report.json")
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"native": False, "native_reason": f"nothing was compiled here yet; run: {_REBUILD}"}
    except ValueError as error:
        return {"native": False, "native_reason": f"{path} is damaged ({error}); run: {_REBUILD}"}
    return report


def _abi(version: str | None) -> str | None:
    """What of a version decides whether compiled code fits: 2.13 of 2.13.1+cpu, but all of a nightly."""
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
    found = torch.cuda.get_device_capability(device)
    if found >= oldest:
        return None
    return (
        f"its CUDA kernels were compiled for compute capability {oldest[0]}.{oldest[1]} and newer, and this GPU has "
        f"{found[0]}.{found[1]} (TORCH_CUDA_ARCH_LIST chooses when it is compiled)"
    )


def why_not_native() -> str | None:
    """Why the compiled part is not there, in words; None when it is."""
    return _native_reason


def module() -> ModuleType:
    """`rlhf_kernels._C`; to be asked for only where `native_available()`."""
    if _native is None:
        raise RuntimeError(f"the compiled part of rlhf_kernels is not there: {_native_reason}")
    return _native


def _triton() -> str:
    try:
        return metadata.version("triton")  # from its metadata: importing it takes seconds
    except metadata.PackageNotFoundError:
        return "not installed (pip install triton)"


def _cpu_bf16() -> str | None:
    return f"multiplied as {'bf16' if _native.cpu_multiplies_bf16() else 'float32'}" if _native else None


def build_info() -> dict[str, Any]:
    """What this installation consists of and, where something is missing, the reason. Made to be printed.

    `native`: the compiled C++ is loaded; `cuda`: it holds the CUDA kernels; `cpu_isa`: the instruction set it chose on
    this machine; `cpu_bf16`: whether that multiplies bf16 as it is (AMX, AVX512_BF16; several times faster) or as
    float32; `compiler_output`: the last lines of a failed compilation; `triton`: its version or why not.
    """
    from . import __version__
    from ._workspace import workspace_budget_mib

    cuda_reason = None if native_has_cuda() else _report.get("cuda_reason") or "the compiled part is not loaded"
    return {
        "version": __version__,
        "torch_running": str(torch.__version__),
        "torch_compiled": _report.get("torch"),
        "compiler": _report.get("compiler"),
        "compiler_output": _report.get("compiler_output"),
        "native": native_available(),
        "native_reason": _native_reason,
        "cuda": native_has_cuda(),
        "cuda_reason": cuda_reason,
        "cpu_isa": _native.cpu_isa() if _native else None,
        "cpu_bf16": _cpu_bf16(),
        "workspace_budget_mib": {device: workspace_budget_mib(device) for device in ("cpu", "cuda")},
        "triton": _triton(),
    }
