"""linear_dpo_loss with a reference: four GEMMs, and three where a larger budget keeps the logits."""

import pytest
import torch

from benchmarks.harness.heads import SMALLEST, VOCAB, bf16_shape, cpu_case, head_case
from benchmarks.harness.linear_dpo import LinearDPO


@pytest.mark.budget(turns=130, peaks=50)
def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    n, d, v = bf16_shape()
    targets = {"Liger, compiled": {"total": 0.95, "total_larger_budget": 0.7, "peak_total_mib": 1.0}}
    measure(cpu_case(LinearDPO, n, d, v, dtype=torch.bfloat16), targets if v == VOCAB else None)


@pytest.mark.budget(turns=55, peaks=30)
def test_heads(measure):
    measure(head_case(LinearDPO, SMALLEST))
