"""Whole optimisation steps: `rlhf dpo` against TRL's DPOTrainer and a plain loop, on the same model and pairs.

What is timed, and what is not, stands in step.py. Each run is a fresh process; the trainers take turns. Losses must be
the plain loop's: a trainer that is faster at something else is no rival. `over_rlhf` is a trainer's median time over
that of `rlhf dpo`, `cpu_over_rlhf` the same of processor time; above 1, `rlhf dpo` is faster.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.conftest import failing_tests
from benchmarks.harness import overlays
from benchmarks.harness.peers import installed, older_trl
from benchmarks.harness.record import ROOT
from benchmarks.steps.step import Sizes, make_data, make_model

RIVALS = (f"trl-{installed('trl')}", f"trl-{older_trl()}", "plain")
ROUNDS = 2
ENOUGH_S = 300  # for one process
LARGEST_LOSS_DIFFERENCE = 1e-4  # in fp32, in nats; what rounding makes of the losses of a few steps is a tenth of it


def shown(name: str) -> str:
    return name.replace("trl-", "TRL ").replace("rlhf-", "rlhf, ")


class Track:
    """A model and pairs on disk, and what each trainer's turns on them found."""

    def __init__(
        self,
        folder: Path,
        sizes: Sizes,
        dtype: str = "float32",
        trainers: tuple[str, ...] = RIVALS,
        *,
        part: str = "whole",
        warm_up: int = 2,
        learning_rate: float = 1e-4,
        enough_s: float = ENOUGH_S,
    ) -> None:
        self.folder, self.sizes, self.dtype = folder, sizes, dtype
        self.part, self.warm_up, self.learning_rate, self.enough_s = part, warm_up, learning_rate, enough_s
        self.turns: dict[str, list[dict]] = {name: [] for name in ("rlhf", *trainers)}
        make_model(folder / "model", sizes)
        make_data(folder / "pairs.jsonl", sizes)

    def take_turn(self, name: str) -> None:
        turns = self.turns[name]
        if turns and turns[-1]["status"] != "measured":
            return  # nor will it run the next time
        out = self.folder / f"{name}-{len(turns)}.json"
        command = [
            sys.executable, "-m", "benchmarks.steps.step", "--trainer", name, "--model", self.folder / "model",
            "--data", self.folder / "pairs.jsonl", "--out", out, "--batch", str(self.sizes.batch),
            "--dtype", self.dtype, "--part", self.part, "--warm-up", str(self.warm_up), "--learning-rate", str(self.learning_rate),
        ]  # fmt: skip
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        if (overlay := overlays.FOLDER / name).is_dir():
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=self.enough_s
            )
        except subprocess.TimeoutExpired:
            turns.append({"status": f"not measured: took more than {self.enough_s:.0f} s"})
            return
        if done.returncode == 0:
            turns.append(json.loads(out.read_text()))
        else:
            said = done.stderr.strip().rpartition("\n")[2][:160]
            turns.append({"status": f"cannot run here: {said or f'exit status {done.returncode}'}"})

    def entries(self) -> list[dict]:
        """One for each trainer, measured or not."""
        return [self.entry(name) for name in self.turns]

    def entry(self, name: str) -> dict:
        turns = self.turns[name]
        row = {
            "trainer": shown(name), "status": turns[-1]["status"], "dtype": self.dtype,
            "model": self.sizes.shown(), "batch": self.sizes.batch, "rounds": len(turns),
        }  # fmt: skip
        if row["status"] != "measured":
            return row
        for kind, over in (("step_ms", "over_rlhf"), ("step_cpu_ms", "cpu_over_rlhf")):
            times_ms, rlhf_ms = self.times_ms(name, kind), self.times_ms("rlhf", kind)
            median_ms = statistics.median(times_ms)
            row[kind] = {"median": round(median_ms, 2), "min": min(times_ms), "max": max(times_ms)}
            if rlhf_ms:
                row[over] = round(median_ms / statistics.median(rlhf_ms), 3)
        for key in ("peak_extra_mib", "before_steps_s", "total_s"):
            row[key] = round(statistics.median(turn[key] for turn in turns), 2)
        row["losses"] = turns[-1]["losses"]
        plain = self.turns.get("plain", [{"status": "left out"}])[-1]
        if plain["status"] == "measured":
            differences = [abs(a - b) for turn in turns for a, b in zip(turn["losses"], plain["losses"], strict=True)]
            row["max_loss_difference"] = max(differences)
        return row

    def times_ms(self, name: str, kind: str) -> list[float]:
        measured = [turn for turn in self.turns[name] if turn["status"] == "measured"]
        return [ms for turn in measured for ms in turn[kind]]


def test_steps(benchmark, keep, tmp_path):
    if said := failing_tests("dpo step"):
        pytest.fail(f"the tests of rlhf dpo fail, so it is not measured:\n{said}")
    track = Track(tmp_path, Sizes())

    def rivals() -> None:
        for name in RIVALS:
            track.take_turn(name)

    benchmark.pedantic(track.take_turn, args=("rlhf",), setup=rivals, rounds=ROUNDS)
    entries = track.entries()
    for entry in entries:
        benchmark.extra_info[f"{entry['trainer']} over rlhf"] = entry.get("over_rlhf", entry["status"])
        keep(entry, "steps")
    check(entries)


def check(entries: list[dict]) -> None:
    """Raises AssertionError if `rlhf dpo` or the plain loop was not measured, or if losses are not the plain loop's."""
    status = {entry["trainer"]: entry["status"] for entry in entries}
    assert status["rlhf"] == status["plain"] == "measured", status
    for entry in entries:
        if entry["dtype"] == "float32" and entry["status"] == "measured":
            assert entry["max_loss_difference"] <= LARGEST_LOSS_DIFFERENCE, entry
