"""linear_dpo_loss with a reference: four GEMMs, and three where a larger budget keeps the logits."""

import pytest
import torch

from benchmarks.harness.heads import SMALLEST, VOCAB, bf16_is_fast, bf16_shape, cpu_job, head_job


def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    n, d, v = bf16_shape()
    job = cpu_job("linear_dpo_loss", n, d, v, torch.bfloat16, sequences=(4, n // 4))
    targets = {"eager": {"total": 0.4}, "Liger": {"total": 0.6, "total_larger_budget": 0.45}}
    measure(job, targets if v == VOCAB else None, peaks=bf16_is_fast())


@pytest.mark.parametrize("model", [SMALLEST, "Llama 3 8B"])
def test_heads(measure, model):
    measure(head_job("linear_dpo_loss", model, sequences=4), peaks=True)
