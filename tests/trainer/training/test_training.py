"""The loop that all stages share: schedules, means, and what happens to a batch that breaks it."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from rlhf_trainer.config.base import TrainConfig
from rlhf_trainer.errors import TrainingError
from rlhf_trainer.training.batch_plan import plan_batches
from rlhf_trainer.training.loop import learning_rate_at
from rlhf_trainer.training.output_folder import partial_folder
from rlhf_trainer.training.task import LossOutput, Totals


def config(**options):
    return TrainConfig(model_name_or_path="m", dataset_name="d", output_dir="o", learning_rate=1.0, **options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rates_by_hand(schedule, expected):
    rates = [learning_rate_at(config(lr_scheduler_type=schedule, warmup_steps=2), step, 6) for step in range(1, 7)]
    assert rates == pytest.approx(expected)


def test_learning_rates_are_transformers_without_a_warm_up():
    from transformers import get_scheduler

    for schedule in ("constant", "linear", "cosine"):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=5)
        for step in range(1, 6):
            rate = learning_rate_at(config(lr_scheduler_type=schedule), step, 5)
            assert rate == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()


def test_a_warm_up_longer_than_the_run():
    assert [learning_rate_at(config(warmup_steps=4), step, 2) for step in (1, 2)] == [0.25, 0.5]


def output(loss, smallest, largest, tokens):
    metrics = {"loss": torch.tensor(loss)}
    extremes = {"min_reward": torch.tensor(smallest)}, {"max_reward": torch.tensor(largest)}
    return LossOutput(torch.tensor(loss), metrics, torch.tensor(tokens), *extremes)


def test_means_and_extremes():
    totals = Totals()
    totals.add(output(loss=1.0, smallest=-3.0, largest=2.0, tokens=5), 0.25)
    totals.add(output(loss=2.0, smallest=-1.0, largest=7.0, tokens=6), 0.75)
    totals.add(output(loss=9.0, smallest=-99.0, largest=99.0, tokens=7), 0.0)  # a repetition
    metrics, tokens = totals.reduce(Accelerator(cpu=True))
    assert metrics == {"loss": 1.75, "min_reward": -3.0, "max_reward": 7.0}
    assert tokens == 11


def test_a_process_with_repetitions_alone_counts_nothing():
    """It still names every metric, so that all processes fold the same ones."""
    totals = Totals()
    totals.add(output(loss=9.0, smallest=-99.0, largest=99.0, tokens=7), 0.0)
    metrics, tokens = totals.reduce(Accelerator(cpu=True))
    assert metrics == {"loss": 0.0, "min_reward": math.inf, "max_reward": -math.inf}
    assert tokens == 0


def test_metrics_of_whole_numbers_and_without_extremes():
    totals = Totals()
    totals.add(LossOutput(torch.tensor(1.0), {"right": torch.tensor(3)}, torch.tensor(4)), 0.5)
    assert totals.reduce(Accelerator(cpu=True)) == ({"right": 1.5}, 4)


def test_a_plan_by_sizes():
    """Four, one, three and two pairs in batches of five and micro-batches of four."""
    plan = plan_batches([9, 5, 7, 6], 5, 4, seed=None, sizes=[4, 1, 3, 2])
    assert plan == [[[1], [0]], [[3], [2]]]
    assert plan_batches([1, 1], 2, 2, seed=None, sizes=[7, 1]) == [[[0]], [[1]]], "one that exceeds it stands alone"


def test_weights_that_the_last_update_broke_are_not_saved(model_folder, rows, write_jsonl, train, tmp_path):
    with pytest.raises(TrainingError, match="step 1: the last update left weights that are not finite"):
        train(
            model_name_or_path=model_folder("gpt2"), dataset_name=write_jsonl(rows(4)), max_steps=1, warmup_steps=0,
            learning_rate=1e38, output_dir=str(tmp_path / "out"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_batch_that_breaks_the_run_is_saved(model_folder, rows, write_jsonl, train, tmp_path):
    data = rows(4)
    with pytest.raises(TrainingError, match=r"rows \[1, 2, 3, 4\], saved with their tokens in .*bad_batch.json"):
        train(
            model_name_or_path=model_folder("gpt2"), dataset_name=write_jsonl(data), num_train_epochs=20,
            learning_rate=1e30, warmup_steps=0, output_dir=str(tmp_path / "diverges"),
        )  # fmt: skip
    saved = json.loads((partial_folder(tmp_path / "diverges") / "bad_batch.json").read_text())
    assert sorted(example["row"] for example in saved["examples"]) == [1, 2, 3, 4]
    assert not all(math.isfinite(value) for value in saved["metrics"].values())
    assert all(len(example["responses"]) == 2 for example in saved["examples"])
