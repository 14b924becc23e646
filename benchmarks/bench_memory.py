"""Peak extra memory of a step besides the gradients themselves, each in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import VOCAB, bf16_vocab

ROOT = Path(__file__).resolve().parent.parent

# dtype, what, largest number of MiB that is good enough: the budget of 64, plus the fp32 dH (4 N D bytes).
STEPS = [
    ("bfloat16", "fused", 64 + 4),
    ("bfloat16", "eager", None),
    ("float32", "fused", 64 + 4),
    ("float32", "eager", None),
]


@pytest.mark.parametrize(("dtype", "what", "limit_mib"), STEPS)
def test_peak(record, dtype, what, limit_mib):
    if (dtype, what) == ("bfloat16", "eager") and bf16_vocab() < VOCAB:
        pytest.skip("torch would take ten minutes for it on this CPU")

    def measure() -> dict:
        command = [sys.executable, "-m", "benchmarks.peak_memory", what, dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        row = {"what": f"peak extra MiB, {dtype} 1024x1024x151936, total", "against": what}
        return {**row, "ratio": round(float(done.stdout)), "target": limit_mib}

    record(measure)
