"""The kernels' launches, tiles and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logits import Side
from . import INTERPRETED
from .maths import AFFINE, IDENTITY, SOFTCAP

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

WARPS = 8


def configs(hip: bool) -> list[triton.Config]:
    """The tuner's choices: none changes a bit of a result, so that ranks, runs and batches agree whatever it takes.
    GROUP: row blocks that stay in L2 together. Stages: tiles in flight, as many as fit into shared memory (64 KiB on
    AMD)."""
    choices = [(2, 1)] if INTERPRETED else itertools.product((8, 16), (2,) if hip else (3, 4))
    return [triton.Config({"GROUP": group}, num_warps=WARPS, num_stages=stages) for group, stages in choices]


def tuned(kernel: Any) -> Any:
    """Tunes a kernel once for each head and tile, keeping the finding on disk. The number of rows is not part of the
    key: it changes from step to step. Nor is a dtype, which JSON would refuse; the tile follows from it."""
    key = ["width", "vocab", "ROWS", "COLUMNS", "DEPTH", "TMA"]
    return triton.autotune(configs=configs(torch.version.hip is not None), key=key, cache_results=True)(kernel)


class Tile(NamedTuple):
    """A tile of logits, and how much of the multiplication's inner dimension is taken at a time. Fixed for each dtype,
    because the order of sums follows from it."""

    rows: int
    columns: int
    depth: int


LIGHT, MEDIUM, HEAVY = range(3)  # how many registers a tile of logits takes besides its own


def tile_for(device: torch.device, gemm: torch.dtype, load: int) -> Tile:
    """The largest tile that spills no registers: tests/kernels/triton/test_triton_compiled.py."""
    if INTERPRETED:
        return Tile(64, 128, 128)
    if gemm == torch.float32:  # no matrix unit multiplies fp32 exactly: less data for each operation
        return Tile(32, 64 if load < HEAVY else 32, 32)
    if load == LIGHT and has_tma(device):
        return Tile(128, 128, 64)
    return Tile(64, 128 if load < HEAVY else 64, 64)


def has_tma(device: torch.device) -> bool:
    """Tensor memory access: NVIDIA's Hopper and newer."""
    if INTERPRETED or torch.version.hip is not None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def readable(tensor: Tensor, gemm: torch.dtype) -> Tensor:
    """Kernels round what they read to the GEMM's dtype; the interpreter would truncate, so there torch rounds."""
    return tensor.to(gemm) if INTERPRETED else tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Tracing sees the kernel (torch.library.wrap_triton); eager mode and the interpreter run it, on the device of the
    first argument: Triton itself takes the current one."""
    runner = kernel if INTERPRETED else torch.library.wrap_triton(kernel)
    if INTERPRETED or runner is not kernel:
        runner[grid](*args, **options)
        return
    with torch.cuda.device_of(args[0]):
        if hasattr(kernel, "configs") and torch.cuda.is_current_stream_capturing():
            # Nothing can be timed while a graph is captured: the tuner's last choice, or the first choice.
            options |= getattr(kernel, "best_config", kernel.configs[0]).all_kwargs()
            runner = kernel.fn
        runner[grid](*args, **options)


def define_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as `torch.ops.rlhf_kernels.<name>`: one whose kernels torch.compile sees, or an opaque one
    under the interpreter, which cannot be traced."""
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(f"rlhf_kernels::{name}", mutates_args=())


def uses_tma(tensor: Tensor) -> bool:
    """The one switch between tensor descriptors and plain pointers: where the GPU has them and the tensor allows."""
    traced = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    if traced or not has_tma(tensor.device):  # tracing has no addresses
        return False
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    if not aligned or tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1]:  # rows may not overlap
        return False
    device = tensor.device  # the allocator outlives this call: it may not hold the tensor
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    return True


def readable_side(side: Side) -> Side:
    bias = contiguous(side.head.bias)
    return side.with_tensors(readable(side.hidden, side.gemm), readable(side.head.weight, side.gemm), bias)


def transform_arguments(side: Side) -> dict[str, Any]:
    """The kernels' gain, cap and slope, as csrc/common/online_softmax.h's LogitMap has them."""
    scale, softcap, temperature = side.transform
    slope = scale / temperature
    if softcap:
        return {"gain": scale / softcap, "cap": softcap / temperature, "slope": slope, "KIND": SOFTCAP}
    plain = side.head.bias is None and slope == 1.0
    return {"gain": slope, "cap": 0.0, "slope": slope, "KIND": IDENTITY if plain else AFFINE}
