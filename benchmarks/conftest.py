"""Paired measurement: contenders take turns in one process, ratios are of medians, and the table says the target."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk

ROWS: list[dict] = []
ENOUGH_S = 90  # of measuring one row: slower contenders take fewer turns, but at least two


def pytest_addoption(parser):
    parser.addoption(
        "--save-results", metavar="FILE", help="write the table as JSON, with machine, versions and commit"
    )


def keep(row: dict, config: pytest.Config) -> None:
    """Into the table, and into the file at once, so that a run that is interrupted leaves what it measured.

    A file of the same machine, versions and commit is added to: suites may be run one by one.
    """
    ROWS.append(row)
    if not (path := config.getoption("--save-results")):
        return
    here, rows = environment(), []
    if Path(path).exists():
        saved = json.loads(Path(path).read_text())
        rows = saved.pop("rows")
        rows = rows if saved == here else []
    rows = [old for old in rows if (old["what"], old["against"]) != (row["what"], row["against"])]
    Path(path).write_text(json.dumps({**here, "rows": [*rows, row]}, indent=1) + "\n")


@pytest.fixture
def compare(benchmark, request):
    """compare(what, contenders, targets, rounds): times contenders["fused"] with pytest-benchmark, the others in turn,
    `rounds` times or as often as fits `ENOUGH_S`.

    `targets` maps a contender's name to the largest ratio fused / contender that is good enough, or to None.
    """

    def run(what: str, contenders: dict[str, Callable], targets: dict[str, float | None], rounds: int, **extra) -> None:
        rivals = {name: contenders[name] for name in targets}
        times_s: dict[str, list[float]] = {name: [] for name in rivals}

        def time_rivals() -> None:
            for name, rival in rivals.items():
                start = time.perf_counter()
                rival()
                times_s[name].append(time.perf_counter() - start)

        start = time.perf_counter()
        for contender in [contenders["fused"], *rivals.values()]:
            contender()  # touches memory, starts threads, compiles what compiles
        affordable = int(ENOUGH_S / (time.perf_counter() - start))
        rounds = max(2, min(rounds, affordable))
        benchmark.pedantic(contenders["fused"], setup=time_rivals, rounds=rounds)
        fused_s = benchmark.stats.stats.median
        for name, target in targets.items():
            ratio = fused_s / statistics.median(times_s[name])
            row = {"what": what, "against": name, "ratio": round(ratio, 3), "target": target, "rounds": rounds, **extra}
            benchmark.extra_info[f"ratio to {name}"] = row["ratio"]
            keep(row, request.config)

    return run


@pytest.fixture
def record(benchmark, request):
    """record(row): adds a row that is not a ratio of times."""

    def add(measure: Callable[[], dict]) -> None:
        keep(benchmark.pedantic(measure, rounds=1), request.config)

    return add


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    terminalreporter.section("against the targets")
    line = "{what:52} {against:22} {ratio:>8} {target:>8}  {verdict}".format
    terminalreporter.write_line(line(what="what", against="against", ratio="ratio", target="target", verdict=""))
    for row in ROWS:
        target = row["target"]
        verdict = "" if target is None else "ok" if row["ratio"] <= target else "MISSED"
        shown = {**row, "target": "" if target is None else target, "verdict": verdict}
        terminalreporter.write_line(
            line(**{key: shown[key] for key in ("what", "against", "ratio", "target", "verdict")})
        )
    if path := config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {path}")


def environment() -> dict:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    peers = {name: installed.get(name, "not installed") for name in ("trl", "liger-kernel")}
    built = rk.build_info()
    return {
        "machine": {"cpu": cpu, "threads": torch.get_num_threads(), "cpu_isa": built["cpu_isa"]},
        "versions": {"rlhf_kernels": built["version"], "torch": torch.__version__, **peers},
        "commit": commit.stdout.strip(),
    }
