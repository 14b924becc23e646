"""`build_info`: the parts of this installation."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from . import _extension
from ._workspace import workspace_budget_mib

__version__ = "0.1.0"


def build_info() -> dict[str, Any]:
    """The parts of this installation and, where something is missing, the reason. Made to be printed.

    `native`: the compiled C++ is loaded; `cuda`: it holds the CUDA kernels; `cpu_isa`: the instruction set it chose on
    this machine; `cpu_bf16`: whether that multiplies bf16 as it is (AMX, AVX512_BF16; several times faster) or as
    float32; `compiler_output`: the last lines of a failed compilation; `triton`: its version or why not.
    """
    report, has_cuda = _extension.build_report(), _extension.native_has_cuda()
    native = _extension.module() if _extension.native_available() else None
    return {
        "version": __version__,
        "torch_running": str(torch.__version__),
        "torch_compiled": report.get("torch"),
        "compiler": report.get("compiler"),
        "compiler_output": report.get("compiler_output"),
        "native": native is not None,
        "native_reason": _extension.why_not_native(),
        "cuda": has_cuda,
        "cuda_reason": None if has_cuda else report.get("cuda_reason") or "the compiled part is not loaded",
        "cpu_isa": native.cpu_isa() if native else None,
        "cpu_bf16": f"multiplied as {'bf16' if native.cpu_multiplies_bf16() else 'float32'}" if native else None,
        "workspace_budget_mib": {device: workspace_budget_mib(device) for device in ("cpu", "cuda")},
        "triton": _triton_version(),
    }


def _triton_version() -> str:
    try:
        return metadata.version("triton")  # from its metadata: importing it takes seconds
    except metadata.PackageNotFoundError:
        return "not installed (pip install triton)"
