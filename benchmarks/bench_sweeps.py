"""One thing varies, the rest stays: what benchmarks/scaling/growth.py fits laws to."""

import pytest
import torch

from benchmarks.harness.heads import bf16_is_fast, cpu_job
from rlhf_kernels._workspace import LEAST_MIB

N, D, V = 256, 1024, 32768
LEAST = {"least": LEAST_MIB}  # what grows is memory too: what less of it costs


def sweep_job(sweep: str, n: int = N, d: int = D, v: int = V, dtype=torch.float32, budgets_mib=None, **options):
    return cpu_job(
        "linear_logprobs", n, d, v, dtype, sweep=sweep, rivals=("eager",), budgets_mib=budgets_mib or {}, **options
    )


@pytest.mark.parametrize("n", [16, 64, 256, 1024, 4096])
def test_n(measure, n):
    measure(sweep_job("n", n=n, budgets_mib=LEAST), peaks=True)


@pytest.mark.parametrize("v", [2048, 8192, 32768, 131072, 262144])
def test_v(measure, v):
    measure(sweep_job("v", v=v, budgets_mib=LEAST), peaks=True)


@pytest.mark.parametrize("d", [256, 512, 1024, 2048, 4096])
def test_d(measure, d):
    measure(sweep_job("d", d=d, budgets_mib=LEAST), peaks=True)


@pytest.mark.parametrize("masked", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_masked(measure, masked):
    """Cost follows the tokens that count; a fresh dW is written whatever their number."""
    targets = {"native, unmasked": {"total": round(1 - masked + 0.2, 2)}}
    measure(sweep_job("masked", n=1024, masked=masked), targets if masked else None, peaks=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(measure, dtype):
    measure(sweep_job("dtype", n=N if bf16_is_fast() else 32, v=8192, dtype=dtype))


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_pairs_per_response(measure, pairs):
    """Eight responses, each computed once by whoever can, in more and more pairs."""
    job = cpu_job(
        "linear_dpo_loss", 256, D, V, sequences=(8, 32), pairs_per_response=pairs, sweep="pairs",
        rivals=("eager", "Liger"), budgets_mib={},
    )  # fmt: skip
    measure(job)


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_threads(measure, threads):
    if threads > torch.get_num_threads():
        pytest.skip(f"{torch.get_num_threads()} threads here")
    measure(sweep_job("threads", threads=threads))
