"""linear_kl, the exact KL over the whole vocabulary, forward and backward."""

import pytest

from benchmarks.heads import HEADS, SMALLEST, cpu_job


@pytest.mark.parametrize(("model", "n", "d", "v", "softcap"), HEADS[:3], ids=[head[0] for head in HEADS[:3]])
def test_heads(measure, model, n, d, v, softcap):
    measure(cpu_job("linear_kl", n // 2, d, v, softcap=softcap, model=model), peaks=model == SMALLEST)
