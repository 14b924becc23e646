"""The heads that are measured on a CPU: D and V of real models, and the tokens it multiplies in about a second."""

from typing import Any

import torch

import rlhf_kernels as rk
from benchmarks.harness.case import HeadCase
from rlhf_kernels._workspace import LEAST_MIB

VOCAB = 151936  # Qwen's
SMALLEST = "GPT-2"
# model: N, D, V, soft cap
HEADS = {
    SMALLEST: (512, 768, 50257, None),
    "Qwen 3 4B": (32, 2560, VOCAB, None),
    "Gemma 2 2B": (32, 2304, 256000, 30.0),
}
TILE = 2048  # vocabulary rows of a streamed bare GEMM: large enough for full speed, small enough to stay in cache


def budget_that_keeps(n: int, v: int, device_type: str, models: int = 1) -> int:
    """MiB of scratch in which all logits of so many models are kept for backward: half of it on a CPU, three quarters
    on CUDA."""
    padded = 4 * models * -(-n // 64) * 64 * -(-v // 64) * 64
    return max(LEAST_MIB, -(-padded * (6 if device_type == "cpu" else 4) // (3 << 20)))


def cpu_case(op: type[HeadCase], n: int, d: int, v: int, **options: Any) -> HeadCase:
    """Beside the default budget, unless `budgets_mib` says otherwise, one that keeps all logits."""
    options.setdefault("budgets_mib", {"larger": budget_that_keeps(n, v, "cpu", 2 if op.op == "linear_kl" else 1)})
    return op(n, d, v, backends=("native",), tile=TILE, **options)


def head_case(op: type[HeadCase], model: str, part: int = 1, **options: Any) -> HeadCase:
    """At the head of a real model, with a `part`-th of its tokens. GPT-2's is in fp32; the larger ones, where that is
    fast, in the bf16 that they are trained in, which multiplies four times the tokens in the same time."""
    n, d, v, softcap = HEADS[model]
    dtype = torch.float32
    if model != SMALLEST and bf16_is_fast():
        n, dtype = 4 * n, torch.bfloat16
    return cpu_case(op, n // part, d, v, dtype=dtype, softcap=softcap, model=model, **options)


def bf16_is_fast() -> bool:
    """Not on x86 without AVX512_BF16, where torch multiplies bf16 many times slower than fp32: a head of 150,000 tokens
    would keep it busy for an hour."""
    return rk.build_info()["cpu_bf16"] == "multiplied as bf16"


def bf16_shape() -> tuple[int, int, int]:
    """N, D, V of the rows of DESIGN.md, or GPT-2's head with few tokens where torch could not."""
    return (1024, 1024, VOCAB) if bf16_is_fast() else (16, 768, 50257)
