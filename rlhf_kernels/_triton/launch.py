"""The kernels' launches, tiles and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._logits import Side
from . import INTERPRETED
from .maths import AFFINE, IDENTITY, SOFTCAP

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

WARPS = 8
LEAST_BLOCKS = 16  # of rows: fewer would tell nothing of more, and yet stay on disk


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


def _untuned_choice(kernel: Any, arguments: dict[str, Any], traced: bool) -> triton.Config | None:
    """What a kernel is to run with where the tuner may not decide; None where it may.

    Few rows take the first choice. In a graph that is captured nothing can be timed or loaded: there the tuner's choice
    of this process for such arguments, which has run, or else the first one."""
    if arguments["rows"] < LEAST_BLOCKS * arguments["ROWS"]:
        return kernel.configs[0]
    if traced or not torch.cuda.is_current_stream_capturing():
        return None
    key = [arguments[name] for name in kernel.keys]
    key += [str(arguments[name].dtype) for name in kernel.arg_names if hasattr(arguments.get(name), "dtype")]
    return kernel.cache.get(tuple(key), kernel.configs[0])


class Tile(NamedTuple):
    """A tile of logits, and how much of the multiplication's inner dimension is taken at a time. Fixed for each dtype,
    because the order of sums follows from it."""

    rows: int
    columns: int
    depth: int


LIGHT, MEDIUM, HEAVY, HEAVIEST = range(4)  # how many registers a tile of logits takes besides its own


def tile_for(device: torch.device, gemm: torch.dtype, load: int) -> Tile:
    """The largest tile that spills no registers: tests/kernels/triton/test_triton_compiled.py. docs/gpu-notes.md has
    the arithmetic."""
    if INTERPRETED:
        return Tile(64, 128, 128)
    if gemm == torch.float32:  # no matrix unit multiplies fp32 exactly: less data for each operation
        return Tile(32, 64 if load < HEAVIEST else 32, 32)
    if generation(device) == 9 and load < HEAVY:
        return Tile(128, 256 if load == LIGHT else 128, 64)
    if load == LIGHT and has_tma(device):
        return Tile(128, 128, 64)
    return Tile(64, 128 if load < HEAVIEST else 64, 64)


def generation(device: torch.device) -> int:
    """Of NVIDIA's GPUs, 9 is Hopper; 0 is any other device."""
    if INTERPRETED or torch.version.hip is not None or device.type != "cuda":
        return 0
    return torch.cuda.get_device_capability(device)[0]


def has_tma(device: torch.device) -> bool:
    """Tensor memory access: NVIDIA's Hopper and newer."""
    return generation(device) >= 9


def readable(tensor: Tensor, gemm: torch.dtype) -> Tensor:
    """Kernels round what they read to the GEMM's dtype; the interpreter would truncate, so there torch rounds."""
    return tensor.to(gemm) if INTERPRETED else tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Tracing sees the kernel (torch.library.wrap_triton); eager mode and the interpreter run it, on the device of the
    first tensor: Triton itself takes the current one."""
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    runner = torch.library.wrap_triton(kernel)
    traced = runner is not kernel
    if hasattr(kernel, "configs"):
        choice = _untuned_choice(kernel, dict(zip(kernel.arg_names, args, strict=False)) | options, traced)
        if choice is not None:
            runner = torch.library.wrap_triton(kernel.fn)
            options |= {**choice.kwargs, "num_warps": choice.num_warps, "num_stages": choice.num_stages}
    if traced:
        runner[grid](*args, **options)
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        runner[grid](*args, **options)


def define_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as `torch.ops.rlhf_kernels.<name>`: one whose kernels torch.compile sees, or an opaque one
    under the interpreter, which cannot be traced."""
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(f"rlhf_kernels::{name}", mutates_args=())


def uses_tma(*tensors: Tensor) -> bool:
    """The one switch between tensor descriptors and plain pointers: where the GPU has them and all tensors allow."""
    traced = torch.compiler.is_compiling() or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    if traced or not has_tma(tensors[0].device):  # tracing has no addresses
        return False
    return all(
        t.element_size() == 2  # fp32 is multiplied without matrix units, which wait for no data
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]  # rows may not overlap
        for t in tensors
    )


def described(tensor: Tensor, rows: int, tile: Tile, tma: bool) -> Any:
    """A matrix as a kernel reads it, in blocks of [rows, tile.depth]: by a descriptor (TMA), made here once and not by
    each program, which would also need memory of the user's Triton allocator; or as it is."""
    return TensorDescriptor.from_tensor(tensor, [rows, tile.depth]) if tma else tensor


def readable_side(side: Side) -> Side:
    bias = contiguous(side.head.bias)
    return side.with_tensors(readable(side.hidden, side.gemm), readable(side.head.weight, side.gemm), bias)


def transform_arguments(side: Side) -> dict[str, Any]:
    """The kernels' gain, cap, its inverse and slope, as csrc/common/online_softmax.h's LogitMap has them."""
    scale, softcap, temperature = side.transform
    slope = scale / temperature
    if softcap:
        cap = softcap / temperature
        return {"gain": scale / softcap, "cap": cap, "inverse_cap": 1.0 / cap, "slope": slope, "KIND": SOFTCAP}
    plain = side.head.bias is None and slope == 1.0
    return {"gain": slope, "cap": 0.0, "inverse_cap": 0.0, "slope": slope, "KIND": IDENTITY if plain else AFFINE}
