"""Trackers through accelerate, and a clear word when one is not there."""

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from rlhf_trainer.errors import UsageError
from rlhf_trainer.training.metrics import make_accelerator


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that accelerate knows by name, as wandb is known; it remembers what it is sent."""

    class Remembers(GeneralTracker):
        name = "remembers"
        requires_logging_directory = False
        records = []  # noqa: RUF012

        def __init__(self, run_name, **_):
            super().__init__()
            self.records.append(("start", run_name))

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.records.append(("config", values))

        def log(self, values, step=None, **_):
            self.records.append((step, values))

        def finish(self):
            self.records.append(("end", None))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remembers", Remembers)
    return Remembers


def test_metrics_reach_the_tracker(tracker, model_folder, rows, write_jsonl, train):
    _, records = train(
        model_name_or_path=model_folder("gpt2"), dataset_name=write_jsonl(rows(4)), max_steps=2,
        report_to=["remembers"], project="mine",
    )  # fmt: skip
    start, config, *steps, end = tracker.records
    assert start == ("start", "mine") and end == ("end", None)
    assert config[0] == "config" and config[1]["beta"] == 0.1
    assert [step for step, _ in steps] == [1, 2]
    for (_, values), record in zip(steps, records, strict=True):
        assert values == {key: value for key, value in record.items() if key not in ("step", "epoch")}


def test_an_unknown_tracker(train):
    with pytest.raises(UsageError, match=r"report_to: unknown tracker 'wandbb'; accelerate knows: .*wandb"):
        train(model_name_or_path="m", dataset_name="d", report_to=["wandbb"])


def test_a_tracker_that_is_not_installed(train, monkeypatch):
    """accelerate itself would leave it out without a word."""
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(UsageError, match=r"report_to: wandb is not installed here; installed: none"):
        train(model_name_or_path="m", dataset_name="d", report_to=["wandb"])


def test_none_is_no_tracker(tmp_path):
    """As transformers writes it."""
    assert make_accelerator(["none"], tmp_path).log_with == []
