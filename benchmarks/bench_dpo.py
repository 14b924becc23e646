"""linear_dpo_loss with a reference: four GEMMs, and three where a larger budget keeps the logits."""

import pytest
import torch

from benchmarks.harness.heads import SMALLEST, VOCAB, bf16_is_fast, cpu_case, head_case
from benchmarks.harness.linear_dpo import LinearDPO


@pytest.mark.budget(turns=190, peaks=35)
def test_pairs(measure):
    """4 x 256 tokens; where bf16 is not fast, of GPT-2's head in fp32 and without targets."""
    if bf16_is_fast():
        targets = {"Liger, compiled": {"total": 0.95, "total_larger_budget": 0.7, "peak_total_mib": 1.0}}
        measure(cpu_case(LinearDPO, 1024, 1024, VOCAB, dtype=torch.bfloat16), targets)
    else:
        measure(head_case(LinearDPO, SMALLEST))
