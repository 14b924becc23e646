"""The loop of PPO and GRPO: its prompts, failures on the way, and options."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online import loop
from rlhf_trainer.online.collect import (
    prompts_of_step,
)
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rollouts.sampler import Failure, LocalSampler
from tests.trainer.online import known_tasks as tasks

# --- prompts, failures, samplers


def test_each_epoch_takes_every_prompt_once(task, tmp_path):
    config = GRPOConfig(**task | {"output_dir": str(tmp_path / "out")}, num_generations=4)
    setup = prepare(config)
    rows = [prompt.row for step in range(1, 9) for prompt in prompts_of_step(setup, step)]
    epochs = [Counter(rows[k : k + 64]) for k in (0, 64)]
    assert all(counts == dict.fromkeys(range(1, 17), 4) for counts in epochs)
    assert rows[:64] != rows[64:]
    assert all(len(set(rows[k : k + 4])) == 1 for k in range(0, 128, 4))


class Failing(LocalSampler):
    """Never completes some prompts."""

    def __init__(self, sampler, fails):
        super().__init__(sampler.model, sampler.tokenizer, sampler.bf16)
        self.fails = fails

    def generate(self, requests, sampling, *, seed, number):
        done = super().generate(requests, sampling, seed=seed, number=number)
        return [
            Failure(one.where, "it stalls") if self.fails(one.text) else completion
            for one, completion in zip(requests, done, strict=True)
        ]


def with_sampler(monkeypatch, change):
    make, local = loop.make_sampler, SimpleNamespace(use_vllm=False, bf16=False)
    monkeypatch.setattr(loop, "make_sampler", lambda _, *arguments: change(make(local, *arguments)))


def test_prompts_that_fail_are_reported_and_the_others_learned_from(run, monkeypatch):
    with_sampler(monkeypatch, lambda sampler: Failing(sampler, lambda prompt: prompt.startswith("a")))
    folder, lines = run("grpo", max_steps=4)
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 16  # 4 of 16 prompts, each 4 times
    assert failures[0]["reason"] == "it stalls" and "rows.jsonl, row" in failures[0]["where"]
    assert sum(line["rollouts/failed"] for line in lines) == 16
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_an_iteration_without_a_whole_group_teaches_nothing(run, monkeypatch):
    """One completion of each group fails: there is nothing to compare, and the run goes on."""

    class OneOfFour(LocalSampler):
        def generate(self, requests, sampling, *, seed, number):
            done = super().generate(requests, sampling, seed=seed, number=number)
            return [
                Failure(one.where, "it stalls") if k % 4 == 0 else c
                for k, (one, c) in enumerate(zip(requests, done, strict=True))
            ]

    with_sampler(monkeypatch, lambda sampler: OneOfFour(sampler.model, sampler.tokenizer, sampler.bf16))
    folder, lines = run("grpo")
    assert all(line["rollouts/failed"] == 16 and "loss" not in line for line in lines)
    assert len((folder / "failures.jsonl").read_text().splitlines()) == 8


def test_held_out_prompts_that_fail_are_reported(run, task, tmp_path, monkeypatch):
    with_sampler(monkeypatch, lambda sampler: Failing(sampler, lambda prompt: prompt.startswith("a")))
    held_out = tmp_path / "held_out.jsonl"
    shutil.copy(task["dataset_name"], held_out)
    folder, lines = run("ppo", eval_dataset=str(held_out), max_steps=1)
    assert [line["eval/rollouts/failed"] for line in lines] == [4, 4]
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    steps = [failure["step"] for failure in failures]
    assert steps.count(0) == 4 and steps.count(1) == 8
    assert all("held_out.jsonl, row" in failure["where"] for failure in failures if failure["step"] == 0)


def test_where_all_prompts_fail_the_run_stops(run, monkeypatch):
    with_sampler(monkeypatch, lambda sampler: Failing(sampler, lambda prompt: True))
    with pytest.raises(UsageError, match=r"step 1: no prompt was completed; .*rows.jsonl, row \d+: it stalls"):
        run("grpo")


class Shifted(LocalSampler):
    """Reports log-probs that are off, or none."""

    shift = None

    def generate(self, requests, sampling, *, seed, number):
        done = super().generate(requests, sampling, seed=seed, number=number)
        if self.shift is None:
            return [one._replace(logprobs=None) for one in done]
        return [one._replace(logprobs=[value - self.shift for value in one.logprobs]) for one in done]


def test_a_sampler_that_differs_is_measured_and_corrected_for(run, monkeypatch):
    plain = run("grpo", max_steps=1)[1][0]
    assert plain["sampling/sampling_logp_difference/max"] < 1e-5

    Shifted.shift = 0.25
    with_sampler(monkeypatch, lambda sampler: Shifted(sampler.model, sampler.tokenizer, sampler.bf16))
    off = run("grpo", max_steps=1)[1][0]
    assert off["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25, abs=1e-5)
    assert off["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(0.25), rel=1e-4)
    assert off["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    mode = {"vllm_importance_sampling_mode": "token_truncate", "max_grad_norm": 0, "max_steps": 1}
    for options, weight in (
        ({"use_vllm": False}, 1.0),  # nothing is corrected that this process drew
        ({}, math.exp(0.25)),
        ({"vllm_importance_sampling_clip_max": 1.1}, 1.1),
        ({"vllm_importance_sampling_clip_min": 2.0}, 2.0),
        ({"vllm_importance_sampling_correction": False}, 1.0),
        ({"off_policy_mask_threshold": 0.1}, math.exp(0.25)),  # the policy is the likelier, by 0.25 nats
    ):
        line = run("grpo", use_vllm=True, **mode | options)[1][0] if "use_vllm" not in options else off
        assert line["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-4), options
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(0.25), rel=1e-4)
        assert line.get("sampling/weight/mean", 1.0) == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_is_too_far_from_the_policy_teaches_nothing(run, monkeypatch, algorithm):
    """The sampler's tokens are likelier there than here: nothing is left of them by the weights of sequences, and by
    the threshold nothing of what was worse than expected."""
    with_sampler(monkeypatch, lambda sampler: Shifted(sampler.model, sampler.tokenizer, sampler.bf16))
    monkeypatch.setattr(Shifted, "shift", 0.0)
    plain = run(algorithm, use_vllm=True, max_steps=1)[1][0]
    assert plain["sampling/weight/mean"] == pytest.approx(1, abs=1e-5) and plain["sampling/weight/zeros"] == 0
    monkeypatch.setattr(Shifted, "shift", -0.6)
    kept = run(algorithm, use_vllm=True, max_steps=1, vllm_importance_sampling_clip_min=0.9)[1][0]
    assert kept["sampling/weight/zeros"] == 1.0
    assert algorithm == "ppo" or kept["grad_norm"] == 0
    options = {"off_policy_mask_threshold": 0.5, "vllm_importance_sampling_correction": False}
    half = run(algorithm, use_vllm=True, max_steps=1, **options)[1][0]
    assert 0.1 < half["sampling/weight/zeros"] < 0.9


def test_a_sampler_without_log_probs_is_not_corrected_for(run, monkeypatch):
    Shifted.shift = None
    with_sampler(monkeypatch, lambda sampler: Shifted(sampler.model, sampler.tokenizer, sampler.bf16))
    assert "sampling/kl" not in run("grpo", max_steps=1)[1][0]
    line = run("grpo", max_steps=1, use_vllm=True)[1][0]
    assert line["sampling/weight/mean"] == 1.0  # and a run that draws ahead, which needs it, is refused


# --- options and bad input


def test_completions_that_did_not_end(run):
    """max_completion_length=2 ends none in time: they are punished, or not learned from."""
    _, lines = run("ppo", max_completion_length=2, missing_eos_penalty=1.0, lam=1.0)
    assert lines[0]["completions/clipped_ratio"] == 1.0 and lines[0]["val/num_eos_tokens"] == 0
    assert lines[0]["val/returns"] == pytest.approx(lines[0]["reward"] - 1.0, abs=1e-5)
    _, lines = run("grpo", max_completion_length=2, mask_truncated_completions=True)
    assert "loss" not in lines[0]  # there was nothing to learn


def test_rows_without_an_answer_are_skipped_if_that_is_wanted(run, task, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(task["dataset_name"]).read_text().splitlines()]
    del rows[5]["answer"]
    data = tasks.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=r"row 6, .*needs a column"):
        run("grpo", dataset_name=data)
    run("grpo", dataset_name=data, skip_invalid_rows=True)
    assert "15 prompts, 1 invalid rows skipped" in capsys.readouterr().out


def test_a_kl_that_is_not_known_is_not_logged(run):
    _, lines = run("grpo")
    assert "kl" not in lines[0] and "objective/kl" not in lines[0]
    assert lines[0]["objective/entropy"] > 0  # its log-probs are known when it has learned
    folder, lines = run("grpo", beta=0.1)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6) and lines[1]["kl"] > 0
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8


def test_groups_of_equal_rewards_are_counted(run):
    _, lines = run("grpo", max_completion_length=1)
    assert lines[0]["frac_reward_zero_std"] == 1.0 and lines[0]["grad_norm"] == 0.0


def test_held_out_prompts_are_answered_alike_every_time(run, task):
    folder, lines = run("grpo", eval_dataset=task["dataset_name"], eval_steps=1, learning_rate=1e-12)
    rewards = [line["eval/reward"] for line in lines]
    assert len(rewards) == 3 and len(set(rewards)) == 1
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("grpo", {"num_generations": 1}, "num_generations must be >= 2"),
        ("grpo", {"batch_size": 10}, "batch_size counts completions: .* num_generations=4"),
        ("grpo", {"beta": 0.1, "kl_estimator": "k1"}, "its expected gradient is zero. Take k2, k3 or exact"),
        ("grpo", {"beta": 0.1, "kl_estimator": "exact", "kl_in": "reward"}, "Take k1, or kl_in loss"),
        ("ppo", {"kl_estimator": "exact", "whiten_rewards": True}, "pass whiten_advantages or kl_in loss instead"),
        ("grpo", {"vllm_importance_sampling_clip_max": 0.0}, "vllm_importance_sampling_clip_max above it, got 0 and 0"),
        ("ppo", {"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold must be above 0"),
        ("ppo", {"delta": 1.0}, "delta must be above 1"),
        ("grpo", {"delta": 2.0, "loss_type": "sapo"}, "delta: loss_type sapo has no ratio"),
        ("grpo", {"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
        ("ppo", {"temperature": 0.0}, "temperature must be finite and above 0"),
        ("ppo", {"lam": 1.5}, r"lam must be in \[0, 1\]"),
        ("ppo", {"target_kl": 1.0, "beta": 0.0}, "target_kl adapts beta, which must start above 0"),
        ("ppo", {"value_model_name_or_path": "x"}, "a shared value head starts from the policy"),
        ("ppo", {"num_mini_batches": 3}, "num_mini_batches must divide batch_size=16, got 3"),
        ("ppo", {"kl_gain": 5.0}, "kl_gain must be below 5"),
        ("ppo", {"beta": math.inf}, "beta must be finite"),
        ("ppo", {"reward_funcs": []}, "nothing rewards the completions"),
        ("ppo", {"max_completion_length": 40}, "max_prompt_length and max_completion_length together"),
        ("ppo", {"beta": 0.0, "ref_model_name_or_path": "x"}, "with beta 0 nothing is compared with it"),
        ("ppo", {"reward_funcs": ["json_schema"]}, "row 1.*json_schema.*needs a column 'schema'"),
        ("ppo", {"reward_funcs": ["math:sqrt"]}, "math:sqrt"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(run, monkeypatch, algorithm, options, message):
    monkeypatch.setattr(LocalSampler, "generate", None)
    with pytest.raises(UsageError, match=message):
        run(algorithm, **options)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_an_adapter_on_a_bf16_base_learns(algorithm, run, task):
    """Completions are drawn with the adapter; the exact KL in the loss is from the same model without it."""
    more = {"value_model": "separate"} if algorithm == "ppo" else {}
    folder, records = run(
        algorithm, use_peft=True, lora_dropout=0.0, lora_target_modules=["all-linear"], learning_rate=1e-2, beta=0.05,
        kl_estimator="exact", kl_in="loss", max_steps=3, **more,
    )  # fmt: skip
    kl = [record["objective/kl"] for record in records]
    assert abs(kl[0]) < 1e-6 < kl[-1]
    assert records[-1]["sampling/sampling_logp_difference/mean"] < 0.05
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not list(folder.glob("model*.safetensors"))
