"""A GRPO loss from hidden states: linear_logprobs and the clipped ratio, against packages that fuse both."""

import pytest

from benchmarks.harness.grpo import GRPO
from benchmarks.harness.heads import SMALLEST, head_case


@pytest.mark.budget(turns=55)
def test_head(measure):
    measure(head_case(GRPO, SMALLEST, sequences=8))
