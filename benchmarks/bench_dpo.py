"""linear_dpo_loss with a reference: four GEMMs, and three where a larger budget keeps the logits."""

import torch

from benchmarks.heads import HEADS, VOCAB, bf16_is_fast, bf16_shape, cpu_job


def dpo_job(n: int, d: int, v: int, dtype: torch.dtype = torch.float32, **options):
    return cpu_job("linear_dpo_loss", n, d, v, dtype, sequences=(4, n // 4), **options)


def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    n, d, v = bf16_shape()
    targets = {"eager": {"total": 0.4}, "Liger": {"total": 0.6}}
    measure(dpo_job(n, d, v, torch.bfloat16), targets if v == VOCAB else None, peaks=bf16_is_fast())


def test_gpt2(measure):
    model, n, d, v, _ = HEADS[0]
    measure(dpo_job(n, d, v, model=model), peaks=True)


def test_llama(measure):
    model, n, d, v, _ = HEADS[3]
    measure(dpo_job(n, d, v, model=model), peaks=True)
