"""benchmarks/steps/step.py, bench_step.py and bench_dpo_step.py at tiny sizes: every trainer runs, or says why not,
and all losses agree."""

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import time

import pytest
import torch

from benchmarks import bench_dpo_step, bench_step
from benchmarks.bench_step import Track, check
from benchmarks.harness.record import Results
from benchmarks.steps.step import Sizes, make_data, make_model
from benchmarks.steps.step_parts import Parts
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.models.loading import load_tokenizer

TINY = Sizes(layers=1, hidden=32, vocab=512, batch=2, tokens=16, steps=4)
PAIR = Sizes(layers=1, hidden=128, vocab=512, batch=1, tokens=16, steps=3, intermediate=96, kv_heads=1, equal=True)
has_trl = importlib.util.find_spec("trl") is not None


@pytest.fixture
def track(tmp_path, monkeypatch):
    """One thread: the sizes are too small for more, which would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *trainers: Track(tmp_path, TINY, trainers=trainers)


def installed_trl() -> list[str]:
    return [f"trl-{importlib.metadata.version('trl')}"] if has_trl else []


def test_losses_agree_and_every_trainer_has_an_entry(track):
    run = track("plain", *installed_trl(), "trl-0.0.1")
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


def test_up_to_gradients_losses_agree_and_start_at_log_2(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = bench_dpo_step.track_of(tmp_path, PAIR, "float32", ("plain", *installed_trl()))
    for name in run.turns:
        run.take_turn(name)
    entries = bench_dpo_step.entries_of(run)
    bench_dpo_step.check(entries)
    assert [entry["trainer"] for entry in entries[:3]] == ["rlhf", "rlhf, share_prefix", "plain"]
    for entry in entries:
        assert entry["status"] == "measured", entry
        assert entry["case"] == bench_dpo_step.CASE and entry["rounds"] == 1
        assert len(entry["losses"]) == PAIR.steps and entry["first_loss_error"] < 1e-6
        assert entry["max_loss_difference"] < 1e-5
        assert 0 < entry["step_ms"]["median"] < 1e3 * entry["total_s"]
        assert ("targets" in entry) == entry["trainer"].startswith("rlhf")
    assert not entries[0]["judged"], "the targets are of bf16"
    json.dumps(entries)
    with pytest.raises(AssertionError, match=r"0\.01"):
        bench_dpo_step.check([entries[0] | {"first_loss_error": 0.01}, *entries[1:]])


def test_targets_are_those_of_the_versions_that_ran(tmp_path):
    rivals = ("trl-1.16.7", "trl-1.13.0", "trl-1.130.0", "plain")
    run = bench_dpo_step.track_of(tmp_path, PAIR, "bfloat16", rivals)
    run.turns = {name: [{"status": "not installed: it"}] for name in run.turns}
    ours = bench_dpo_step.entries_of(run)[0]
    assert ours["judged"] and ours["targets"]["time"] == {"TRL 1.16.7": 0.1, "TRL 1.13.0": 0.4}


def test_the_pair_has_the_tokens_that_the_case_names(tmp_path):
    sizes = Sizes(layers=1, hidden=64, vocab=128, batch=1, tokens=bench_dpo_step.SIZES.tokens, steps=2, equal=True)
    make_model(tmp_path / "model", sizes)
    make_data(tmp_path / "pairs.jsonl", sizes)
    tokenizer = load_tokenizer(str(tmp_path / "model"), key="model")
    pairs = load_groups(
        str(tmp_path / "pairs.jsonl"), tokenizer, split="train", max_prompt_length=1023, max_length=1024
    ).examples
    assert bench_dpo_step.SIZES.equal and len(pairs) == sizes.steps * sizes.batch
    for pair in pairs:
        assert len(pair.prompt) == 255
        assert len(pair.prompt + pair.chosen) == len(pair.prompt + pair.rejected) == 511


def test_parts_are_all_that_is_timed_and_memory_is_above_what_stays():
    weight = torch.nn.Parameter(torch.ones(1 << 20))  # 4 MiB, and so is its gradient
    optimizer, parts = torch.optim.SGD([weight], lr=1.0), Parts()

    class Trainer:
        def step(self, scratch_mib: int) -> None:
            time.sleep(0.01)
            torch.ones(scratch_mib << 18)
            weight.grad = torch.ones_like(weight)

    trainer = Trainer()
    parts.wrap(trainer, "step")
    for _ in range(3):
        with parts.timed(reference=True):
            time.sleep(0.02)
    for scratch_mib in (200, 40, 60):
        trainer.step(scratch_mib)
        time.sleep(0.2)  # as clipping, logging and data would
        with parts.timed():
            pass  # a second part of the same step
        optimizer.step()
        optimizer.zero_grad()
    parts.hook.remove()
    found = parts.found(warm_up=1)
    assert len(found["step_ms"]) == 2 and all(30 <= ms < 200 for ms in found["step_ms"])
    assert all(ms < 200 for ms in found["step_cpu_ms"])
    assert 50 < found["peak_extra_mib"] < 70, "the most of a timed step, without the warm-up's"


def test_a_case_is_a_row_of_its_own_and_sizes_that_were_left_alone_are_not_named(tmp_path):
    assert list(Sizes().shown()) == ["layers", "hidden", "vocab", "batch", "tokens", "steps"]
    results = Results(tmp_path / "cpu.json", {"commit": "abc"})
    for row in ({"ms": 1}, {"ms": 2, "case": "a"}, {"ms": 3, "case": "b"}, {"ms": 4}, {"ms": 5, "case": "a"}):
        results.add({"trainer": "rlhf"} | row, "steps")
    assert [row["ms"] for row in results.content["steps"]] == [3, 4, 5]
