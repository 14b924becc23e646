"""linear_logprobs, forward and backward, against the bare GEMMs, eager torch and other packages."""

import pytest
import torch

from benchmarks.harness.heads import HEADS, VOCAB, bf16_is_fast, bf16_shape, cpu_case, head_case
from benchmarks.harness.linear_logprobs import LinearLogprobs


@pytest.mark.budget(turns=180, peaks=30)
def test_fp32(measure):
    case = cpu_case(LinearLogprobs, 1024, 1024, VOCAB, budgets_mib={"64 MiB": 64})
    logits_mib, hidden_gradient_mib = (4 * case.n * size / 2**20 for size in (case.v, case.d))
    lean = min(64 + hidden_gradient_mib, 0.05 * 2 * logits_mib)  # 5% of the logits and dlogits that eager holds
    targets = {"eager": {"total": 0.85}, "native, 64 MiB budget": {"peak_total_mib": lean}}
    measure(case, targets)


@pytest.mark.budget(turns=135, peaks=30)
def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    targets = {"bare GEMMs": {"forward": 1.02, "total": 1.02}}
    case = cpu_case(LinearLogprobs, *bf16_shape(), dtype=torch.bfloat16)
    measure(case, targets if bf16_is_fast() else None)


@pytest.mark.budget(turns=100, peaks=20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen(measure, dtype):
    """As under LoRA: d log p / d hidden comes with the statistics, so that two products are all."""
    shape = (1024, 1024, VOCAB) if dtype == torch.float32 else bf16_shape()
    rivals = ("eager", "torch.compile", "torch chunked")
    case = cpu_case(LinearLogprobs, *shape, dtype=dtype, frozen=True, rivals=rivals, budgets_mib={})
    measure(case, {"bare GEMMs": {"total": 1.08}} if bf16_is_fast() else None)


@pytest.mark.budget(turns=65)
@pytest.mark.parametrize("model", HEADS)
def test_heads(measure, model):
    measure(head_case(LinearLogprobs, model))
