"""benchmarks/steps at tiny sizes: every trainer runs, step by step, or says why not, and all losses agree."""

import importlib.metadata
import json

import pytest
import torch

from benchmarks.harness.record import Results
from benchmarks.steps import track as tracks
from benchmarks.steps.inputs import Sizes, make_model, make_pairs
from benchmarks.steps.track import WARM_UP, Track, check
from benchmarks.steps.watch import Watch
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.models.loading import load_tokenizer

TINY = Sizes(layers=1, hidden=64, vocab=512, batch=2, tokens=16, steps=4)


def test_losses_agree_and_every_trainer_has_a_row(tmp_path, monkeypatch):
    """One thread: the sizes are too small for more, which would wait for each other."""
    pytest.importorskip("trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = Track(tmp_path, TINY).run()
    check(rows)
    trl = f"TRL {importlib.metadata.version('trl')}"
    ours = ["rlhf", "rlhf, share_prefix", "rlhf, padding_free"]
    assert [row["trainer"] for row in rows] == [*ours, trl, f"{trl}, fused"]
    for row in rows:
        assert row["status"] == "measured", row
        assert row["rounds"] == TINY.steps - WARM_UP and len(row["losses"]) == TINY.steps
        assert row["first_loss_error"] < 1e-6 and row["max_loss_difference"] < 1e-5
        assert row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
        assert 0 < row["gradients_ms"]["min"] <= row["step_ms"]["max"]
        assert ("targets" in row) == row["trainer"].startswith("rlhf")
    assert rows[0]["over_rlhf"] == 1 and not rows[0]["judged"], "the targets are of bf16"
    json.dumps(rows)


def test_a_trainer_that_fails_has_its_error_as_status(tmp_path):
    """It ends before its first step; nobody waits for it."""
    (row,) = Track(tmp_path, TINY, trainers=("no such trainer",)).run()
    assert row["status"] == "cannot run here: KeyError: 'no such trainer'"
    with pytest.raises(AssertionError, match="KeyError"):
        check([row | {"trainer": "rlhf"}, row | {"trainer": tracks.label_of("TRL")}])


def test_other_losses_are_refused():
    entry = {"status": "measured", "dtype": "float32", "max_loss_difference": 0.0}
    rows = [entry | {"trainer": tracks.label_of("TRL")}, entry | {"trainer": "rlhf", "max_loss_difference": 1e-3}]
    with pytest.raises(AssertionError, match="rlhf"):
        check(rows)


def test_the_pair_has_the_tokens_that_the_case_names(tmp_path):
    sizes = Sizes(layers=1, hidden=64, vocab=128, steps=2)
    make_model(tmp_path / "model", sizes)
    make_pairs(tmp_path / "pairs.jsonl", sizes)
    tokenizer = load_tokenizer(str(tmp_path / "model"), key="model")
    groups = load_groups(
        str(tmp_path / "pairs.jsonl"), Codec(tokenizer), split="train", max_prompt_length=1023, max_length=1024
    ).examples
    assert "of 255 tokens" in tracks.CASE and len(groups) == sizes.steps * sizes.batch
    for group in groups:
        assert len(group.prompt) == 127
        assert [len(group.prompt + response) for response in group.responses] == [255, 255]


def test_a_step_begins_with_its_turn_and_memory_is_above_what_stays():
    turns = []
    watch = Watch(lambda: turns.append(len(watch.steps)))
    layer = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB, and so is its gradient
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with torch.no_grad():
        layer(torch.ones(1, 1024))  # the reference's: no turn is taken for it
    assert turns == []
    for scratch_mib in (200, 40, 60):
        loss = layer(torch.ones(1, 1024)).sum()
        torch.ones(scratch_mib << 18)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for hook in watch.hooks:
        hook.remove()
    columns = watch.columns(warm_up=1)
    assert turns == [0, 1, 2, 3], "before every step, and after the last one"
    assert len(columns["step_ms"]) == len(columns["gradients_ms"]) == 2
    for step in watch.steps:
        assert step.started <= step.forward <= step.update <= step.ended
    assert 50 < columns["peak_extra_mib"] < 75, "the most of a timed step, without the warm-up's"


def test_a_case_is_a_row_of_its_own(tmp_path):
    results = Results(tmp_path / "cpu.json", {"commit": "abc"})
    for row in ({"ms": 1}, {"ms": 2, "case": "a"}, {"ms": 3, "case": "b"}, {"ms": 4}, {"ms": 5, "case": "a"}):
        results.add({"trainer": "rlhf"} | row, "steps")
    assert [row["ms"] for row in results.content["steps"]] == [3, 4, 5]
