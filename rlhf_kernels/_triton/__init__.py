"""The parts that the Triton kernels of every room share. Importing this package does not import triton; its modules
do."""

from __future__ import annotations

import os
from importlib import util

import torch

_INSTALLED = util.find_spec("triton") is not None
# Triton itself reads this once, when a kernel is defined: it then runs on numpy, on tensors of any device.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_on(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device; None when they can."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton kernels run on a GPU, not on {device.type} tensors (for tests: TRITON_INTERPRET=1)"
    if torch.compiler.is_compiling() or torch.version.hip is not None:  # a device's properties are not to be traced
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return None
    return f"Triton kernels need a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"
