"""The one knob that bounds scratch memory, for every backend."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from . import _extension

PAD_ROWS, PAD_COLUMNS = 64, 64  # kept logits come in multiples: csrc/common/tile_plan.h, kRowBlock and cached_vocab
_NO_LIMIT = 1 << 50
LEAST_MIB, MOST_MIB = 8, 1 << 40  # whose bytes an int64 holds, several times
SHARE, LEAST_DEFAULT_MIB, MOST_DEFAULT_MIB = 32, 64, 1024  # of this machine's memory, on a CPU
CUDA_DEFAULT_MIB = 256
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_budget_mib: int | None = None


def set_workspace_budget(mib: int | None) -> None:
    """Bounds the scratch memory of one call, kept logits included.

    Args:
        mib: whole number from 8 to 2**40, or None for each kind of device's default: on CPU a 32nd of the memory that
            this process may use, at least 64 and at most 1024; 256 on CUDA. `build_info` shows both. The native
            backend keeps logits in fp32 between forward and backward where they fit, which spares their share of one
            GEMM of four, or of `linear_kl`'s two of six: on CPU as many as fit half of the budget beside what backward
            needs, if that is an eighth of them or more; on CUDA all or none, in three quarters of it; under
            torch.compile none. Each call that waits for its backward holds its own; on CPU the memory of the
            last one stays for the next call, until a smaller budget is set.

    Raises:
        TypeError, ValueError: not a whole number, below 8 or above 2**40.
    """
    global _budget_mib
    if isinstance(mib, bool) or not isinstance(mib, int | None):
        raise TypeError(f"mib must be an int or None, got {type(mib).__name__}")
    if mib is not None and not LEAST_MIB <= mib <= MOST_MIB:
        raise ValueError(f"mib must be {f'>= {LEAST_MIB}' if mib < LEAST_MIB else f'<= {MOST_MIB}'}, got {mib}")
    _budget_mib = mib
    _hand_over()


def _hand_over() -> None:
    if _extension.native_available():
        _extension.module().set_workspace_budget_mib(workspace_budget_mib("cpu"), workspace_budget_mib("cuda"))


def workspace_budget_mib(device_type: str) -> int:
    return _budget_mib or (_cpu_default_mib() if device_type == "cpu" else CUDA_DEFAULT_MIB)


@functools.cache
def _cpu_default_mib() -> int:
    return default_mib(memory_bytes())


def default_mib(memory: int) -> int:
    """Of a machine with so many bytes of memory. Logits are kept from it, which takes one GEMM of four away."""
    return min(max((memory >> 20) // SHARE, LEAST_DEFAULT_MIB), MOST_DEFAULT_MIB)


def memory_bytes() -> int:
    """Of this machine, or what a container leaves of it."""
    limits = [
        text for path in CGROUP_LIMITS if Path(path).is_file() and (text := Path(path).read_text().strip()).isdigit()
    ]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(int, limits)])


def workspace_budget_bytes(device: torch.device) -> int:
    return workspace_budget_mib(device.type) << 20


def logits_to_keep(rows: int, vocab: int, width: int, device: torch.device, ref_width: int = 0) -> int:
    """The number of fp32 logits that a native forward keeps for backward: see `set_workspace_budget`. None in a traced
    graph, which serves several numbers of rows. `ref_width`: of the reference of a KL, which keeps both models'
    logits."""
    if torch.compiler.is_compiling():
        return 0
    budget, models = workspace_budget_bytes(device), 2 if ref_width else 1
    if device.type != "cpu":
        whole = models * rows * (-(-vocab // PAD_COLUMNS) * PAD_COLUMNS)
        return whole if 4 * whole <= budget * 3 // 4 else 0
    # Backward must find the room it would have had, however few of the rows count: a smaller plan would be slower, and
    # would add up gradients in another order. It takes three quarters of what is there.
    *_, scratch = _extension.module().plan_backward(rows, vocab, width, 4, _NO_LIMIT, ref_width)
    room = min(budget // 2, budget - scratch * 4 // 3) // 4
    logits = -(-rows // PAD_ROWS) * PAD_ROWS * vocab * models
    return min(logits, room) if logits <= 8 * room else 0


_hand_over()
