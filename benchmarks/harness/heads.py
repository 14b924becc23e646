"""The heads that are measured on a CPU: D and V of real models, and the tokens it multiplies in about a second."""

from __future__ import annotations

import functools
import time

import torch

from benchmarks.harness.jobs import Job, budget_that_keeps

VOCAB = 151936  # Qwen's
# model: N, D, V, soft cap
HEADS = {
    "GPT-2": (1024, 768, 50257, None),
    "Qwen 3 4B": (128, 2560, VOCAB, None),
    "Gemma 2 2B": (128, 2304, 256000, 30.0),
    "Llama 3 8B": (128, 4096, 128256, None),
}
# Peak memory takes a fresh process a contender, and each makes a head: of those of 2 GB it is measured with DPO alone.
SMALLEST = "GPT-2"
TILE = 2048  # vocabulary rows of a streamed bare GEMM: large enough for full speed, small enough to stay in cache


def cpu_job(op: str, n: int, d: int, v: int, dtype: torch.dtype = torch.float32, **options) -> Job:
    """Beside the default budget, unless `budgets_mib` says otherwise, one that keeps all logits."""
    options.setdefault("budgets_mib", {"larger": budget_that_keeps(n, v, "cpu", 2 if op == "linear_kl" else 1)})
    return Job(op, n, d, v, dtype=dtype, backends=("native",), tile=TILE, **options)


def head_job(op: str, model: str, *, sequences: int | None = None, part: int = 1) -> Job:
    """At the head of a real model, with a `part`-th of its tokens. GPT-2's is in fp32; the larger ones, where that is
    fast, in the bf16 that they are trained in, which multiplies four times the tokens in the same time."""
    n, d, v, softcap = HEADS[model]
    dtype = torch.float32
    if model != SMALLEST and bf16_is_fast():
        n, dtype = 4 * n, torch.bfloat16
    n //= part
    shape = None if sequences is None else (sequences, n // sequences)
    return cpu_job(op, n, d, v, dtype, softcap=softcap, model=model, sequences=shape)


@functools.cache
def bf16_is_fast() -> bool:
    """Not on x86 without AVX-512, where torch multiplies bf16 many times slower than fp32: a head of 150,000 tokens
    would keep it busy for an hour."""

    def seconds(dtype: torch.dtype) -> float:
        dlogits, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
        times = []
        for _ in range(3):  # the least: on a busy machine a product this small takes ten times as long now and then
            start = time.perf_counter()
            dlogits @ weight
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 5 * seconds(torch.float32)


def bf16_shape() -> tuple[int, int, int]:
    """N, D, V of the rows of DESIGN.md, or GPT-2's head with few tokens where torch could not."""
    return (1024, 1024, VOCAB) if bf16_is_fast() else (16, 768, 50257)
