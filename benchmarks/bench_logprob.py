"""linear_logprobs, forward and backward, against the bare GEMMs, eager torch and other packages."""

import pytest
import torch

from benchmarks.harness.heads import HEADS, SMALLEST, VOCAB, bf16_is_fast, bf16_shape, cpu_job, head_job
from benchmarks.harness.peers import installed, older_trl


def test_fp32(measure):
    job = cpu_job("linear_logprobs", 1024, 1024, VOCAB)
    fp32_hidden_gradient_mib = 4 * job.n * job.d / 2**20
    measure(job, {"eager": {"total": 1.3}, "native": {"peak_total_mib": 64 + fp32_hidden_gradient_mib}}, peaks=True)


def test_bf16(measure):
    """The targets are for the whole vocabulary, on a CPU that multiplies bf16 fast."""
    targets = {
        "bare GEMMs": {"forward": 1.35, "total": 1.35},
        "eager": {"forward": 0.4, "total": 0.5},
        f"TRL {older_trl()}": {"total": 0.25},
        f"TRL {installed('trl')}": {"total": 0.1},
    }
    job = cpu_job("linear_logprobs", *bf16_shape(), torch.bfloat16)
    measure(job, targets if bf16_is_fast() else None, peaks=True)


@pytest.mark.parametrize("model", HEADS)
def test_heads(measure, model):
    measure(head_job("linear_logprobs", model), peaks=model == SMALLEST)
