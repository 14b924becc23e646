"""The loop that all stages share: schedules, means, and what happens to a batch that breaks it."""

import io
import json
import math
import re

import pytest
import torch
import transformers
from accelerate import Accelerator

from rlhf_trainer.cli import main
from rlhf_trainer.config.base import TrainConfig
from rlhf_trainer.errors import TrainingError, UsageError
from rlhf_trainer.models import fused_lm
from rlhf_trainer.offline import sft
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.recipes.config import OnlineDPOConfig
from rlhf_trainer.training.batch_plan import plan_batches
from rlhf_trainer.training.journal import Journal
from rlhf_trainer.training.memory import lack_of_memory
from rlhf_trainer.training.optimizers import check_warmup, learning_rate_at
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


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.25, 3, 5])
def test_warm_ups_are_as_long_as_those_of_transformers(warmup, steps, tmp_path):
    theirs = transformers.TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup)
    assert config(warmup_steps=warmup).warmup_in(steps) == theirs.get_warmup_steps(steps)
    if warmup < 1:
        assert config(warmup_steps=9, warmup_ratio=warmup).warmup_in(steps) == theirs.get_warmup_steps(steps)


def test_a_run_that_ends_inside_its_warm_up_is_refused():
    check_warmup(config(warmup_steps=4), 5)
    check_warmup(config(warmup_ratio=0.9), 1)
    with pytest.raises(UsageError, match=r"the run has 4 steps, .* warmup_steps is 4. Pass warmup_steps 0.1"):
        check_warmup(config(warmup_steps=4), 4)
    with pytest.raises(UsageError, match="warmup_ratio must be below 1, got 3; warmup_steps counts steps"):
        config(warmup_ratio=3)


def test_the_defaults_of_dpo_reach_their_learning_rate():
    """40 pairs are one step of its batch, which the paper's 150 steps of warm-up would make at 1/150 of the rate."""
    for defaults in (DPOConfig, OnlineDPOConfig):
        names = {"reward_model_name_or_path": "r"} if defaults is OnlineDPOConfig else {}
        dpo = defaults(model_name_or_path="m", dataset_name="d", output_dir="o", **names)
        check_warmup(dpo, 1)
        assert learning_rate_at(dpo, 1, 1) == dpo.learning_rate
        assert [learning_rate_at(dpo, step, 20) / dpo.learning_rate for step in (1, 2, 3)] == [0.5, 1, 1]


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


def lacks_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def lacks_memory(*_):
    torch.empty(1 << 55)


def lacks_python_memory(*_):
    raise MemoryError


@pytest.mark.parametrize("fails", [lacks_gpu_memory, lacks_memory, lacks_python_memory])
def test_running_out_of_memory_is_one_message(fails, model_folder, rows, write_jsonl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "token_loss", fails)
    flags = {
        "model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(8)), "micro_batch_size": 4,
        "output_dir": tmp_path / "out", "max_length": 64,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    assert main(["sft", *words]) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"^rlhf sft: out of memory of the (GPU|machine): step 1, a micro-batch of 4 x \d+ tokens. Lower "
        r"micro_batch_size \(4\), max_length \(64\), or pass --gradient_checkpointing, --bf16. With "
        r"--dry_run it says what each part takes$",
        error, re.MULTILINE,
    ), error  # fmt: skip
    assert "Traceback" not in error


def test_lack_of_memory_anywhere_else_is_told_by_the_command(monkeypatch, model_folder, write_jsonl, capsys, tmp_path):
    monkeypatch.setattr(fused_lm, "load_causal_lm", lacks_memory_with_options)
    data = write_jsonl([{"prompt": "a", "completion": "b"}])
    words = ["--model_name_or_path", model_folder("llama"), "--dataset_name", data, "--output_dir", str(tmp_path / "o")]
    assert main(["sft", *words]) == 1
    assert "rlhf sft: out of memory of the machine: rlhf sft. Lower micro_batch_size (8)," in capsys.readouterr().err


def lacks_memory_with_options(*_, **__):
    lacks_memory()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), lack_of_memory(config(), lambda: ""):
        raise RuntimeError("shapes differ")


def steps_printed(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_without_a_terminal_steps_are_lines(train, model_folder, rows, write_jsonl, capsys):
    data = write_jsonl(rows(6))
    options = {"model_name_or_path": model_folder("llama"), "dataset_name": data, "num_train_epochs": 5}
    _, records = train(**options, eval_dataset=data)
    before, *lines, after = steps_printed(capsys)
    number = r"[-+.e\d]+"
    assert re.match(rf"step 0/5 eval/loss {number} eval/rewards/accuracies {number} ", before)
    assert re.match(rf"step 5/5 eval/loss {number} ", after)
    pattern = rf"step \d/5 loss {number} rewards/accuracies {number} learning_rate 0.001 tokens_per_second {number}$"
    assert len(lines) == 5 and re.match(pattern, lines[-1]), lines
    assert f"loss {records[1]['loss']:.4g} " in lines[0]
    train(**options, logging_steps=2)
    assert [line.split()[1] for line in steps_printed(capsys)] == ["2/5", "4/5", "5/5"]


def test_with_a_terminal_there_is_a_bar_and_evaluations_are_lines(
    train, model_folder, rows, write_jsonl, capsys, monkeypatch
):
    data = write_jsonl(rows(6))
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    train(model_name_or_path=model_folder("llama"), dataset_name=data, eval_dataset=data, num_train_epochs=2)
    assert [line.split()[1:3] for line in steps_printed(capsys)] == [["0/2", "eval/loss"], ["2/2", "eval/loss"]]
    assert "2/2" in terminal.getvalue() and "loss=" in terminal.getvalue()


def test_a_journal_without_a_terminal_prints_ten_lines(tmp_path, capsys):
    with Journal(tmp_path / "progress.jsonl", 40, "rlhf sample", None) as journal:
        for number in range(40):
            journal.run(lambda number=number: number)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "rlhf sample: batch 4 of 40" and lines[-1] == "rlhf sample: batch 40 of 40"
