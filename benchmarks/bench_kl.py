"""linear_kl, the exact KL over the whole vocabulary, forward and backward."""

import pytest

from benchmarks.harness.heads import SMALLEST, head_case
from benchmarks.harness.linear_kl import LinearKL


@pytest.mark.budget(turns=50)
@pytest.mark.parametrize("model", [SMALLEST, "Qwen 3 4B"])
def test_heads(measure, model):
    measure(head_case(LinearKL, model, part=2))
