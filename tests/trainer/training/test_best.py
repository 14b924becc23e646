"""The best evaluation: whose weights are the result, and when a run ends early."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.config import SFTConfig
from rlhf_trainer.offline.sft import train_sft
from rlhf_trainer.training import loop
from rlhf_trainer.training.best import Best

LOSSES = [3.0, 1.0, 2.0, 1.5, 0.5]  # of the evaluations behind steps 2, 4, 6, 8, 10


def config_of(**options):
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", eval_dataset="e", **options)


@pytest.mark.parametrize(
    ("options", "metrics", "best"),
    [
        ({}, {"eval/loss": LOSSES}, 5),
        ({"greater_is_better": True}, {"eval/loss": LOSSES}, 1),
        ({"metric_for_best_model": "eval_accuracy"}, {"eval/accuracy": LOSSES, "eval/loss": [1.0] * 5}, 1),
        ({"metric_for_best_model": "eval/accuracy", "greater_is_better": False}, {"eval/accuracy": LOSSES}, 5),
        ({}, {"eval/reward": LOSSES}, 1),
        ({}, {"eval/loss": [float("nan"), 2.0, 2.0, 2.0, 2.0]}, 1),
    ],
)
def test_the_best_is_the_first_that_no_other_beats(options, metrics, best):
    judge = Best(config_of(**options), None)
    for step in range(1, 6):
        judge.takes(step, {"loss": -1.0} | {name: values[step - 1] for name, values in metrics.items()})
    assert judge.step == best
    assert not judge.takes(6, {"loss": -9.0})  # a step without an evaluation


def test_it_is_over_after_so_many_that_are_no_better():
    config = config_of(early_stopping_patience=2)
    judge = Best(config, None)
    over = []
    for step, loss in enumerate(LOSSES, start=1):
        judge = Best(config, json.loads(json.dumps(judge.state)))  # as if resumed
        judge.takes(step, {"eval/loss": loss})
        over.append(judge.is_over)
    assert over == [False, False, False, True, False]


def test_wrong_use_is_told():
    with pytest.raises(UsageError, match="metric_for_best_model: expected one of accuracy, loss; got 'f1'"):
        Best(config_of(metric_for_best_model="f1"), None).takes(1, {"eval/loss": 1.0, "eval/accuracy": 0.0})
    with pytest.raises(UsageError, match=r"early_stopping_patience: .* pass eval_dataset"):
        SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", early_stopping_patience=1)


@pytest.fixture
def fit(model_folder, rows, write_jsonl, tmp_path, monkeypatch):
    """fit(name, **options) -> the folder of an SFT of ten steps, evaluated every second as LOSSES say."""
    data = write_jsonl(rows(10))
    evaluate = loop.evaluate

    def run(name, steps=10, **options):
        calls = iter([9.0, *LOSSES, 9.0])  # before training, and of the weights that were restored
        if options.get("resume_from_checkpoint"):
            calls = iter([*LOSSES[2:], 9.0])
        monkeypatch.setattr(loop, "evaluate", lambda *rest: evaluate(*rest) | {"eval/loss": next(calls)})
        return train_sft(
            SFTConfig(
                model_name_or_path=model_folder("llama"), dataset_name=data, eval_dataset=data, eval_steps=2,
                output_dir=str(tmp_path / name), batch_size=2, micro_batch_size=2, max_length=96, max_steps=steps,
                num_train_epochs=3, save_steps=4, learning_rate=1e-2, **options,
            )
        )  # fmt: skip

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_stops_early_leaves_its_best_weights(fit, monkeypatch, capsys):
    options = {"early_stopping_patience": 2, "load_best_model_at_end": True}
    best = fit("best", **options)
    assert steps_of(best) == list(range(9))
    printed = capsys.readouterr().out
    assert "stopped early: nothing has been better than step 4" in printed and "is that of step 4" in printed
    assert (best / loop.BEST).is_dir()
    assert not (fit("alone", save_only_model=True, **options) / loop.BEST).exists()

    kept = {}
    save = loop.save_checkpoint

    def keep(work, step, model, *rest):
        kept[step] = {name: weight.detach().clone() for name, weight in model.model.named_parameters()}
        save(work, step, model, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", keep)
    whole = fit("whole")  # the same steps, to the end
    assert steps_of(whole) == list(range(11))
    result = weights(best)
    assert all(torch.equal(result[name], kept[4][name]) for name in result)
    assert not all(torch.equal(result[name], kept[8][name]) for name in result)


def test_a_longer_run_still_has_the_best_of_before(fit):
    folder = fit("longer", load_best_model_at_end=True, greater_is_better=True)  # step 2 is the best
    before = weights(folder)
    resumed = fit("longer", load_best_model_at_end=True, greater_is_better=True, resume_from_checkpoint=True, steps=12)
    assert steps_of(resumed) == list(range(13))
    after = weights(resumed)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_killed_run_remembers_its_best(fit, tmp_path, monkeypatch):
    options = {"early_stopping_patience": 2, "load_best_model_at_end": True}
    best = weights(fit("whole", **options))

    class Killed(Exception):
        pass

    save = loop.save_checkpoint

    def save_and_die(work, step, *rest):
        save(work, step, *rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            fit("broken", **options)
    shutil.copytree(tmp_path / "broken.partial", tmp_path / "again.partial")
    resumed = fit("broken", resume_from_checkpoint=True, **options)
    assert steps_of(resumed) == list(range(9))
    result = weights(resumed)
    assert all(torch.equal(result[name], best[name]) for name in best)
