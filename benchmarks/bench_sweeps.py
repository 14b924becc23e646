"""One thing varies, the rest stays: what docs/scaling.md shows the growth of."""

import pytest

from benchmarks.harness.heads import cpu_case
from benchmarks.harness.linear_logprobs import LinearLogprobs
from rlhf_kernels._workspace import LEAST_MIB

N, D, V = 256, 1024, 32768
LEAST = {"least": LEAST_MIB}  # what grows is memory too: what less of it costs


def sweep_case(sweep: str, n: int = N, d: int = D, v: int = V, rivals=("eager",), **options):
    options.setdefault("budgets_mib", {})
    return cpu_case(LinearLogprobs, n, d, v, sweep=sweep, rivals=rivals, **options)


def sizes(*small: int, last: int, **budget: int) -> list:
    """The last has a budget of its own."""
    return [*small, pytest.param(last, marks=pytest.mark.budget(**budget))]


@pytest.mark.budget(turns=14, peaks=8)
@pytest.mark.parametrize("n", sizes(16, 64, 256, last=512, turns=30, peaks=10))
def test_n(measure, n):
    measure(sweep_case("n", n=n, budgets_mib=LEAST))


@pytest.mark.budget(turns=14, peaks=8)
@pytest.mark.parametrize("v", sizes(2048, 8192, 32768, last=65536, turns=30, peaks=10))
def test_v(measure, v):
    measure(sweep_case("v", v=v, budgets_mib=LEAST))


@pytest.mark.budget(turns=14)
@pytest.mark.parametrize("d", sizes(256, 1024, last=2048, turns=25))
def test_d(measure, d):
    measure(sweep_case("d", d=d, budgets_mib=LEAST))


@pytest.mark.budget(turns=40)
@pytest.mark.parametrize("masked", [0.25, 0.5, 0.75, 0.9])
def test_masked(measure, masked):
    """Cost follows the tokens that count; a fresh dW is written whatever their number."""
    targets = {"native, unmasked": {"total": round(1.05 - masked, 2)}}
    measure(sweep_case("masked", n=1024, masked=masked, rivals=("native, unmasked",)), targets)
