"""PPO and GRPO, killed and resumed, or in two processes: the same weights and metrics as the unbroken run in one."""

import json
from pathlib import Path

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online import loop, rollout_queue
from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.ppo import train_ppo
from rlhf_trainer.rollouts.sampler import Failure, LocalSampler
from rlhf_trainer.training import loop as training
from tests.trainer.online import known_tasks as tasks
from tests.trainer.training.test_distributed import LAUNCH
from tests.trainer.training.test_resume import assert_same, at_call, killed, result_of

# beta adapts, and lines of failures are dropped with the iterations that are repeated: what is beside the weights.
PPO = {
    "value_model": "separate", "num_ppo_epochs": 2, "num_mini_batches": 2, "beta": 0.1, "target_kl": 0.01,
    "kl_estimator": "exact",
}  # fmt: skip
GRPO = {"num_generations": 4, "beta": 0.05}
LORA = {"use_peft": True, "lora_dropout": 0.2, "lora_r": 4, "lora_target_modules": ["all-linear"], "dtype": "float32"}
ALGORITHMS = {"ppo": (PPOConfig, train_ppo, PPO), "grpo": (GRPOConfig, train_grpo, GRPO)}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run of 5 iterations, with a checkpoint after the second and the fourth."""
    folder = tmp_path_factory.mktemp("reversal")
    torch.manual_seed(0)
    tokenizer, rows = tasks.character_tokenizer(), tasks.reversals(2)
    model = tasks.small_gpt2(tokenizer, width=16, layers=1)
    return {
        "model_name_or_path": tasks.save(folder / "model", model, tokenizer),
        "dataset_name": tasks.write_rows(folder / "rows.jsonl", rows), "reward_funcs": ["regex:[ab]"],
        "batch_size": 16, "micro_batch_size": 4, "per_device_generation_batch_size": 8, "max_prompt_length": 8,
        "max_completion_length": 5, "max_steps": 5, "learning_rate": 1e-2, "save_steps": 2,
        "eval_dataset": str(folder / "rows.jsonl"), "eval_steps": 2,
    }  # fmt: skip


@pytest.fixture
def run(options, tmp_path):
    def train(algorithm, output, **more):
        config, function, own = ALGORITHMS[algorithm]
        return function(config(**options | own | more, output_dir=str(tmp_path / output)))

    return train


KILLS = {
    "before any checkpoint": (rollout_queue, "sample_completions", at_call(3)),  # the first call is the evaluation's
    "half a checkpoint": (torch, "save", at_call(1)),
    "after a checkpoint": (training, "save_checkpoint", at_call(1, after=True)),
    "between an iteration's updates": (training, "learning_rate_at", at_call(10)),
    "before the second checkpoint": (training, "save_checkpoint", at_call(2)),
    "the result written": (loop, "save_result", at_call(1, after=True)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_goes_on(algorithm, point, run):
    if algorithm == "grpo" and point == "between an iteration's updates":
        point = "before any checkpoint"  # it has but one update an iteration
    whole = run(algorithm, "whole")
    killed(lambda: run(algorithm, "broken"), KILLS[point])
    assert_same(run(algorithm, "broken", resume_from_checkpoint=True), whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_adapter_goes_on(algorithm, run):
    """The policy's, and that of a value model; the reference is the policy without it."""
    whole = run(algorithm, "whole", **LORA)
    killed(
        lambda: run(algorithm, "broken", **LORA),
        (training, "learning_rate_at", at_call(11 if algorithm == "ppo" else 4)),
    )
    assert_same(run(algorithm, "broken", resume_from_checkpoint=True, **LORA), whole)
    _, records = result_of(whole)
    kl = "objective/kl" if algorithm == "ppo" else "kl"
    assert records[1][kl] == 0 < records[-1][kl]


def test_a_run_does_not_go_on_with_other_answers(run, options, tmp_path):
    """Rewards go by the columns of the rows, so these are part of what a run began with."""
    rows = [json.loads(line) for line in Path(options["dataset_name"]).read_text().splitlines()]
    data = tasks.write_rows(tmp_path / "rows.jsonl", rows)
    killed(lambda: run("grpo", "broken", dataset_name=data), (rollout_queue, "sample_completions", at_call(5)))
    tasks.write_rows(tmp_path / "rows.jsonl", [row | {"answer": "x"} for row in rows])
    with pytest.raises(
        UsageError, match="is not that which the run began with, so --resume_from_checkpoint cannot go on with it"
    ):
        run("grpo", "broken", dataset_name=data, resume_from_checkpoint=True)


def test_failures_of_repeated_iterations_are_reported_once(run, monkeypatch):
    class Failing(LocalSampler):
        def generate(self, requests, sampling, *, seed, number):
            done = super().generate(requests, sampling, seed=seed, number=number)
            return [
                Failure(one.where, "it stalls") if one.text.startswith("a") else completion
                for one, completion in zip(requests, done, strict=True)
            ]

    make = loop.make_sampler
    monkeypatch.setattr(loop, "make_sampler", lambda *args: Failing((s := make(*args)).model, s.tokenizer, s.bf16))
    whole = (run("grpo", "whole") / "failures.jsonl").read_text()
    killed(lambda: run("grpo", "broken"), (rollout_queue, "sample_completions", at_call(5)))
    assert (run("grpo", "broken", resume_from_checkpoint=True) / "failures.jsonl").read_text() == whole
    assert whole


def test_two_processes_train_as_one(options, tmp_path, python):
    """Each samples and rewards a share of the completions, and all learn from the whole."""
    stages = {algorithm: options | own for algorithm, (_, _, own) in ALGORITHMS.items()}
    stages["grpo, LoRA"] = options | GRPO | LORA | {"lora_dropout": 0.0}
    (tmp_path / "options.json").write_text(json.dumps(stages))
    script = str(Path(__file__).with_name("online_stages.py"))
    for name, launch in (("one", ()), ("two", LAUNCH)):
        done = python(*launch, script, "options.json", name, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == len(stages)
    for algorithm in stages:
        (one_weights, one), (two_weights, two) = (result_of(tmp_path / name / algorithm) for name in ("one", "two"))
        assert len(one) == len(two) == 6
        assert one[-1]["loss"] != one[1]["loss"]
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (algorithm, key)
        assert all(torch.allclose(one_weights[name], two_weights[name], atol=1e-4) for name in one_weights)
