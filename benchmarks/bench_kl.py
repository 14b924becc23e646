"""linear_kl, the exact KL over the whole vocabulary, forward and backward."""

import pytest

from benchmarks.harness.heads import SMALLEST, head_case
from benchmarks.harness.linear_kl import LinearKL


@pytest.mark.budget(turns=55)
def test_head(measure):
    measure(head_case(LinearKL, SMALLEST, part=2))
