"""A GRPO loss from hidden states: linear_logprobs and the clipped ratio, against packages that fuse both."""

import pytest

from benchmarks.harness.heads import SMALLEST, head_job


@pytest.mark.parametrize("model", [SMALLEST, "Qwen 3 4B"])
def test_heads(measure, model):
    measure(head_job("grpo", model, sequences=8), peaks=model == SMALLEST)
