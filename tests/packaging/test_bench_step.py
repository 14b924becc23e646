"""benchmarks/step.py and bench_step.py at tiny sizes: every trainer runs, or says why not, and all losses agree."""

import importlib.metadata
import importlib.util
import json
import math
import subprocess

import pytest

from benchmarks import bench_step
from benchmarks.bench_step import Track, check
from benchmarks.step import Sizes

TINY = Sizes(layers=1, hidden=32, vocab=512, batch=2, tokens=16, steps=4)
has_trl = importlib.util.find_spec("trl") is not None


@pytest.fixture
def track(tmp_path, monkeypatch):
    """One thread: the sizes are too small for more, which would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *trainers: Track(tmp_path, TINY, trainers=trainers)


def test_losses_agree_and_every_trainer_has_an_entry(track):
    installed = [f"trl-{importlib.metadata.version('trl')}"] if has_trl else []
    run = track("plain", *installed, "trl-0.0.1")
    for name in run.turns:
        run.take_turn(name)
    *entries, missing = run.entries()
    check(entries)
    for entry in entries:
        assert entry["status"] == "measured", entry
        assert entry["step_ms"]["min"] <= entry["step_ms"]["median"] <= entry["step_ms"]["max"]
        assert len(entry["losses"]) == TINY.steps and min(entry["losses"]) < math.log(2)  # which it starts from
        assert entry["total_s"] > entry["before_steps_s"] > 0 and entry["over_rlhf"] > 0
        assert entry["max_loss_difference"] < 1e-5
    assert entries[0]["trainer"] == "rlhf" and entries[0]["over_rlhf"] == 1
    assert missing["status"].startswith("not installed: ") and "step_ms" not in missing
    json.dumps(entries)


def test_a_run_that_fails_has_its_error_as_status_and_no_second_turn(track, monkeypatch):
    def fail(command, **_options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback:\n  ...\nValueError: no such thing\n")

    run = track("plain")
    monkeypatch.setattr(bench_step.subprocess, "run", fail)
    for _ in range(2):
        run.take_turn("plain")
    entry = run.entry("plain")
    assert entry["status"] == "cannot run here: ValueError: no such thing" and entry["rounds"] == 1
    with pytest.raises(AssertionError, match="no such thing"):
        check([entry, entry | {"trainer": "rlhf"}])


def test_other_losses_are_refused():
    entry = {"status": "measured", "dtype": "float32", "max_loss_difference": 0.0}
    entries = [entry | {"trainer": "plain"}, entry | {"trainer": "rlhf", "max_loss_difference": 1e-3}]
    with pytest.raises(AssertionError, match="rlhf"):
        check(entries)
