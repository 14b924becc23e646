"""Fixtures of the suites: `measure(case)` takes the turns and keeps the rows; the terminal shows them.

A case's time is its marker, `budget(turns=SECONDS, peaks=SECONDS)`: of trying peers out and of turns, and, beside them,
of processes that measure peak memory, none by default. Their sum is printed when the cases are collected.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness.case import Case
from benchmarks.harness.measuring import LEAST_TURNS, Clock, measure, rates_of
from benchmarks.harness.peers import Peer, is_ours
from benchmarks.harness.record import Results, environment, line_of

TRYING_OUT = 0.4  # of a case's time, until when peers are tried out
MOST_TURNS = 7  # of a case; cases whose contenders are slow take fewer
SHOWN: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--save-results", metavar="FILE", type=Path, help="write what was measured as JSON")


def pytest_configure(config):
    config.addinivalue_line("markers", "budget(turns, peaks=0): seconds of a case")


def budget_of(item) -> dict[str, float]:
    return {"turns": 0, "peaks": 0} | item.get_closest_marker("budget").kwargs


def pytest_report_collectionfinish(items):
    planned = sum(sum(budget_of(item).values()) for item in items)
    return f"at most {planned / 60:.1f} minutes of measuring"


@pytest.fixture(scope="session")
def results(pytestconfig) -> Results | None:
    path = pytestconfig.getoption("--save-results")
    if path is None:
        return None
    opened = Results.open(path, environment(torch.device("cpu")))
    if opened.content["rates"] is None:
        opened.content["rates"] = rates_of(Clock(torch.device("cpu")), torch.float32, 2048, 256)
        opened.write()
    return opened


@pytest.fixture
def keep(results) -> Callable[..., None]:
    """keep(row, section="rows"): onto the screen, and into the file at once, so that a run that is interrupted leaves
    what it measured. A measured row has at least LEAST_TURNS turns."""

    def add(row: dict, line: str, section: str = "rows") -> None:
        if row["status"] == "measured" and row["rounds"] < LEAST_TURNS:
            pytest.fail(f"{row['rounds']} turns are too few for a row: {line}")
        SHOWN.append(line)
        if results is not None:
            results.add(row, section)

    return add


@pytest.fixture(name="measure")
def measure_case(benchmark, keep, request):
    """measure(case, targets={contender: {"forward": ratio, "total": ratio}}, section="rows")."""

    def pace(leader: Callable[[], None], others: Callable[[], None], turns: int) -> None:
        benchmark.pedantic(leader, setup=others, rounds=turns)

    def run(case: Case, targets: dict | None = None, *, section: str = "rows", most_turns: int = MOST_TURNS) -> None:
        budget, started = budget_of(request.node), time.perf_counter()

        def may_start(peer: Peer) -> bool:
            needed = is_ours(peer.name) or peer.name in (targets or {})
            return needed or time.perf_counter() - started < TRYING_OUT * budget["turns"]

        seconds = (1 - TRYING_OUT) * budget["turns"]
        for row in measure(
            case, Clock(case.device), seconds=seconds, peaks_s=budget["peaks"], most_turns=most_turns,
            may_start=may_start, targets=targets, pace=pace,
        ):  # fmt: skip
            keep(row, line_of(row), section)
            for name, ratio in row.get("over_native", {}).items():
                benchmark.extra_info[f"{row['contender']}, {name}"] = ratio
            if row["status"] != "measured" and row["contender"] in case.backends:
                pytest.fail(line_of(row))  # another that cannot is a finding; ours must

    return run


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("medians, the fraction of the bare GEMMs' rate, and the error against fp64")
    for line in SHOWN:
        terminalreporter.write_line(line)
    if path := config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {path}; python -m benchmarks.report writes docs/performance.md")
