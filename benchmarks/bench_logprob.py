"""linear_logprobs, forward and backward, against the bare GEMMs, eager torch and other packages."""

import pytest
import torch

from benchmarks.harness.heads import HEADS, VOCAB, bf16_is_fast, bf16_shape, cpu_case, head_case
from benchmarks.harness.linear_logprobs import LinearLogprobs


@pytest.mark.budget(turns=180, peaks=30)
def test_fp32(measure):
    case = cpu_case(LinearLogprobs, 1024, 1024, VOCAB)
    fp32_hidden_gradient_mib = 4 * case.n * case.d / 2**20
    targets = {
        "eager": {"total": 0.85, "peak_total_mib": 0.05},
        "native": {"peak_total_mib": 64 + fp32_hidden_gradient_mib},
    }
    measure(case, targets)


@pytest.mark.budget(turns=135, peaks=30)
def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    targets = {"bare GEMMs": {"forward": 1.02, "total": 1.02}}
    case = cpu_case(LinearLogprobs, *bf16_shape(), dtype=torch.bfloat16)
    measure(case, targets if bf16_is_fast() else None)


@pytest.mark.budget(turns=65)
@pytest.mark.parametrize("model", HEADS)
def test_heads(measure, model):
    measure(head_case(LinearLogprobs, model))
