"""linear_kl, the exact KL over the whole vocabulary, forward and backward."""

import pytest

from benchmarks.harness.heads import SMALLEST, head_job


@pytest.mark.parametrize("model", [SMALLEST, "Qwen 3 4B", "Gemma 2 2B"])
def test_heads(measure, model):
    measure(head_job("linear_kl", model, part=2), peaks=model == SMALLEST)
