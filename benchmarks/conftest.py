"""What the suites share: `measure(job)` takes the turns and keeps the rows; the terminal shows them."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness.measuring import Clock, measure, rates_of
from benchmarks.harness.record import ROOT, Results, environment, line_of

# Nothing is measured of an op whose tests fail: which tests those are.
LOGPROBS = [f"kernels/test_{name}.py" for name in ("linear_logprobs", "linear_logprobs_rows", "batch_invariance")]
TESTS_OF = {
    "linear_logprobs": LOGPROBS,
    "linear_kl": ["kernels/test_linear_kl.py"],
    "linear_dpo_loss": ["kernels/test_linear_dpo.py"],
    "grpo": LOGPROBS,
    "dpo_loss": ["kernels/test_dpo.py"],
    "bradley_terry_loss": ["kernels/test_bradley_terry.py"],
    "kl_penalty": ["kernels/test_kl_penalty.py"],
    "dpo step": ["trainer/test_dpo.py"],
}
SOURCES = ("csrc", "rlhf_kernels", "python", "tests/kernels", "tests/trainer")  # what they depend on
JOB_SECONDS, MOST_ROUNDS = 12.0, 7  # turns of one job; slow contenders take fewer, but at least two
SHOWN: list[str] = []
STAMPS, TESTS = ROOT / "build/bench", ROOT / "tests"


def pytest_addoption(parser):
    parser.addoption("--save-results", metavar="FILE", type=Path, help="write what was measured as JSON")
    parser.addoption(
        "--job-seconds", type=float, default=JOB_SECONDS, help="of turns of one job; at least two are taken"
    )
    parser.addoption("--no-peaks", action="store_true", help="no peak memory, which takes a fresh process each")


@functools.cache
def sources() -> str:
    files = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*"))
    seen = hashlib.sha256(torch.__version__.encode())
    for path in files:
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".so"):
            seen.update(path.read_bytes())
    return seen.hexdigest()[:16]


@functools.cache
def failing_tests(op: str) -> str:
    """Empty if the op's tests pass; that is remembered, file by file, until a source changes."""
    stamps = {TESTS / name: STAMPS / f"green-{name.replace('/', '-')}-{sources()}" for name in TESTS_OF[op]}
    files = [str(path) for path, stamp in stamps.items() if not stamp.exists()]
    if not files:
        return ""
    threads = {"OMP_NUM_THREADS": "1", "RLHF_KERNELS_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--benchmark-disable", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stdout[-2000:]
    STAMPS.mkdir(parents=True, exist_ok=True)
    for stamp in stamps.values():
        stamp.touch()
    return ""


@pytest.fixture(scope="session")
def results(pytestconfig) -> Results | None:
    path = pytestconfig.getoption("--save-results")
    if path is None:
        return None
    found = Results.open(path, environment(torch.device("cpu")))
    if found.content["rates"] is None:
        found.content["rates"] = rates_of(Clock(torch.device("cpu")), torch.float32, 2048, 256)
        found.write()
    return found


@pytest.fixture
def keep(results) -> Callable[..., None]:
    """keep(row, section="rows"): into the file at once, so that a run that is interrupted leaves what it measured."""

    def add(row: dict, section: str = "rows") -> None:
        if results is not None:
            results.add(row, section)

    return add


@pytest.fixture(name="measure")
def take_turns(benchmark, keep, pytestconfig):
    """measure(job, targets={contender: {"forward": ratio, "total": ratio}}, peaks=True, section="rows")."""

    def run(
        job, targets: dict | None = None, *, peaks: bool = False, section: str = "rows", most_rounds: int = MOST_ROUNDS
    ) -> None:
        if said := failing_tests(job.op):
            pytest.fail(f"the tests of {job.op} fail, so it is not measured:\n{said}")

        def pace(native, others, rounds):
            benchmark.pedantic(native, setup=others, rounds=rounds)

        threads = torch.get_num_threads()
        torch.set_num_threads(job.threads or threads)
        seconds = pytestconfig.getoption("--job-seconds")
        peaks = peaks and not pytestconfig.getoption("--no-peaks")
        turns = {"seconds": seconds, "most_rounds": most_rounds, "targets": targets, "peaks": peaks, "pace": pace}
        try:
            for row in measure(job, Clock(job.device), **turns):
                keep(row, section)
                SHOWN.append(line_of(row))
                if row["status"] != "measured" and row["contender"].partition(",")[0] in job.backends:
                    pytest.fail(line_of(row))  # another that cannot is a finding; ours must
                for name, ratio in row.get("over_native", {}).items():
                    benchmark.extra_info[f"{row['contender']}, {name}"] = ratio
        finally:
            torch.set_num_threads(threads)

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not SHOWN:
        return
    terminalreporter.section("medians, the fraction of the bare GEMMs' rate, and the error against fp64")
    for line in SHOWN:
        terminalreporter.write_line(line)
    if path := config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {path}; python -m benchmarks.report.report writes docs/performance.md")
