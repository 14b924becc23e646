"""The loop of PPO and GRPO: its prompts, losses and gradients, and failures on the way."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online import loop
from rlhf_trainer.online.algorithm import EpisodeTask
from rlhf_trainer.online.collect import (
    compute_rewards,
    make_episodes,
    plan_mini_batches,
    prompts_of_step,
    sample_completions,
)
from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.critic import make_actor_critic
from rlhf_trainer.online.episodes import Episode, score_episodes
from rlhf_trainer.online.grpo import GRPO, train_grpo
from rlhf_trainer.online.metrics import kl_of_tokens, rollout_metrics
from rlhf_trainer.online.ppo import PPO, token_rewards, train_ppo
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rewards.rewards import Scores
from rlhf_trainer.rollouts.sampler import Failure, LocalSampler
from tests.trainer.online import known_tasks as tasks

UNUSED = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["exact_answer"], "output_dir": "out"}
ALGORITHMS = {"ppo": (PPOConfig, PPO, train_ppo), "grpo": (GRPOConfig, GRPO, train_grpo)}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Options of a tiny run: a model of characters that has half learned to reverse words of two letters."""
    folder = tmp_path_factory.mktemp("reversal")
    torch.manual_seed(0)
    tokenizer, rows = tasks.character_tokenizer(), tasks.reversals(2)
    model = tasks.half_taught(tasks.small_gpt2(tokenizer, width=32, layers=1), tokenizer, rows, 200, seed=0)
    return {
        "model_name_or_path": tasks.save(folder / "model", model, tokenizer),
        "dataset_name": tasks.write_rows(folder / "rows.jsonl", rows), "reward_funcs": ["exact_answer"],
        "batch_size": 16, "micro_batch_size": 4, "per_device_generation_batch_size": 8, "max_prompt_length": 8,
        "max_completion_length": 5, "max_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip


@pytest.fixture
def run(task, tmp_path):
    """run("ppo" or "grpo", **options) -> (folder, lines of metrics.jsonl)."""
    made = iter(range(100))

    def train(algorithm, **options):
        config, _, function = ALGORITHMS[algorithm]
        more = {"num_generations": 4} if algorithm == "grpo" else {"value_model": "shared"}
        options = task | more | {"output_dir": str(tmp_path / f"out{next(made)}")} | options
        folder = function(config(**options))
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


# --- against plain statements


def first_batch(config, algorithm):
    """The module that trains, and the first iteration's task, as the loop makes them."""
    setup = prepare(config)
    module = make_actor_critic(setup, config) if algorithm.needs_values else setup.policy
    prompts = prompts_of_step(setup, 1)
    sampler = LocalSampler(setup.policy.model, setup.tokenizer, False)
    completions = sample_completions(setup, sampler, prompts, seed=1, source="rows")
    episodes = make_episodes(prompts, completions, compute_rewards(setup, prompts, completions))
    plan = plan_mini_batches(setup, episodes, range(len(episodes)), seed=1)
    micro_batches = [micro_batch for batch in plan for micro_batch in batch]
    episodes = score_episodes(setup, module, episodes, micro_batches, with_reference=True)
    episodes = algorithm.compute_advantages(episodes, config.beta).episodes
    return module, EpisodeTask(setup, algorithm, episodes, plan, config.beta)


def next_logprobs(model, episode, temperature):
    """[T, V]: of the whole distribution before each token of the completion, from the model's own logits."""
    ids = torch.tensor([episode.prompt + episode.ids])
    logits = model(input_ids=ids).logits[0, len(episode.prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def plain_kl(policy, reference, ids, kind):
    """[T] of [T, V] log-probs: by the tokens that were drawn, or over all."""
    drawn = torch.tensor(ids)[:, None]
    log_ratio = (reference - policy).gather(1, drawn).squeeze(1)
    return {
        "k2": log_ratio**2 / 2,
        "k3": log_ratio.exp() - 1 - log_ratio,
        "exact": (policy.exp() * (policy - reference)).sum(-1),
    }[kind]


def moved(model, by):
    """A copy that is not the reference any more."""
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn_like(weight))


def test_in_bf16_too_the_policy_begins_as_its_reference(run):
    """Both heads compute in the same precision: no KL is made up of rounding."""
    _, lines = run("ppo", bf16=True, max_steps=1)
    assert lines[0]["objective/kl"] == 0.0 and lines[0]["val/ratio"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kind", ["k2", "k3", "exact"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradient_are_those_of_full_logits(task, tmp_path, algorithm, kind):
    """One micro-batch, away from the reference, at a temperature, with the KL in the loss."""
    config_class, algorithm_class, _ = ALGORITHMS[algorithm]
    is_ppo = algorithm == "ppo"
    more = {"value_model": "shared", "entropy_coef": 0.01} if is_ppo else {"num_generations": 4}
    config = config_class(
        **task | more | {"output_dir": str(tmp_path / "out"), "micro_batch_size": 16, "temperature": 0.7, "beta": 0.3},
        kl_in="loss", kl_estimator=kind,
    )  # fmt: skip
    module, online_task = first_batch(config, algorithm_class(config))
    policy, reference = online_task.setup.policy.model, online_task.setup.reference.model
    moved(policy, 0.02)
    indices = online_task.plan[0][0]
    output = online_task.compute_loss(module, indices)
    output.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in policy.named_parameters()}
    policy.zero_grad()

    rows, tokens, entropies = [], 0, []
    for i in indices:
        episode = online_task.episodes[i]
        now, then = next_logprobs(policy, episode, 0.7), next_logprobs(reference, episode, 0.7).detach()
        ratio = (now.gather(1, torch.tensor(episode.ids)[:, None]).squeeze(1) - episode.logprobs).exp()
        gain = torch.minimum(ratio * episode.advantages, ratio.clamp(0.8, 1.2) * episode.advantages)
        rows.append(-gain + 0.3 * plain_kl(now, then, episode.ids, kind))
        entropies.append(-(now.exp() * now).sum(-1))
        tokens += len(episode.ids)
    if is_ppo:
        value = torch.cat([online_task.episodes[i].returns.square() for i in indices]).sum() / 2  # values are still 0
        expected = torch.cat(rows).sum() / tokens + (0.1 * value - 0.01 * torch.cat(entropies).sum()) / tokens
    else:
        expected = torch.stack([row.mean() for row in rows]).mean()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), abs=2e-6)
    for name, weight in policy.named_parameters():
        error = (gradients[name] - weight.grad).norm() / weight.grad.norm().clamp(min=1e-6)
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce"])
def test_micro_batches_change_nothing(run, loss_type):
    """Gradients of 16 completions at once are those of 8 times 2: each loss_type's mean is over the whole batch."""
    lines = [run("grpo", loss_type=loss_type, micro_batch_size=size)[1] for size in (16, 2)]
    for one, other in zip(*lines, strict=True):
        assert one["grad_norm"] > 0
        for name in ("loss", "grad_norm", "reward"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_before_an_update_every_ratio_is_one(run):
    """The log-probs that the policy is held to are its own, bit for bit."""
    _, lines = run("ppo", num_ppo_epochs=1)
    for line in lines:
        assert line["val/ratio"] == 1.0 and line["policy/approxkl_avg"] == 0.0
        assert line["objective/kl"] == 0.0 or line["step"] == 2
    _, lines = run("ppo", num_ppo_epochs=3)
    assert lines[0]["val/ratio"] != 1.0 and lines[0]["policy/approxkl_avg"] > 0.0


def test_each_iteration_learns_in_as_many_passes_as_wanted(run, monkeypatch):
    """num_iterations passes of GRPO, num_ppo_epochs of PPO, over num_mini_batches each."""
    updates, update = [], loop.Run.update
    monkeypatch.setattr(loop.Run, "update", lambda *arguments: (updates.append(1), update(*arguments))[1])
    for algorithm, name in (("grpo", "num_iterations"), ("ppo", "num_ppo_epochs")):
        updates.clear()
        run(algorithm, max_steps=1, num_mini_batches=2, **{name: 3})
        assert len(updates) == 6


@pytest.mark.parametrize(
    ("algorithm", "low", "high"), [("ppo", "cliprange", "cliprange_high"), ("grpo", "epsilon", "epsilon_high")]
)
def test_without_an_upper_clip_it_is_the_lower_one(run, algorithm, low, high):
    passes = {"ppo": "num_ppo_epochs", "grpo": "num_iterations"}[algorithm]
    options = {passes: 4, "max_steps": 1, "learning_rate": 1e-2, low: 0.05}
    one, same, wider = (run(algorithm, **options, **more)[1][0] for more in ({}, {high: 0.05}, {high: 0.5}))
    assert one["loss"] == same["loss"] != wider["loss"]


def test_the_entropy_of_an_iteration_is_logged_where_all_log_probs_are_known():
    """A process that learned from a part of the completions knows those of its own only."""
    logprobs = torch.tensor([-1.0, -0.5])
    known, unknown = (Episode(1, [0], [1, 2], True, 1.0, None, values) for values in (logprobs, None))
    config, scores = GRPOConfig(**UNUSED), Scores(torch.ones(2), torch.ones(2, 1))
    assert rollout_metrics([known, known], scores, ["r"], config, 0.0)["objective/entropy"] == 1.5
    for episodes in ([known, unknown], [unknown, known]):
        assert "objective/entropy" not in rollout_metrics(episodes, scores, ["r"], config, 0.0)


@torch.no_grad()
def test_estimates_of_the_kl_agree_with_the_exact_one(task, tmp_path):
    """Means over 512 completions of a policy that has moved away; k1 and k3 are unbiased."""
    config = PPOConfig(
        **task
        | {"output_dir": str(tmp_path / "out"), "micro_batch_size": 128, "per_device_generation_batch_size": 128},
        kl_estimator="exact", value_model="shared",
    )  # fmt: skip
    setup = prepare(config)
    moved(setup.policy.model, 0.05)
    prompts = setup.prompts * 32
    sampler = LocalSampler(setup.policy.model, setup.tokenizer, False)
    completions = sample_completions(setup, sampler, prompts, seed=1, source="rows")
    episodes = make_episodes(prompts, completions, compute_rewards(setup, prompts, completions))
    micro_batches = [list(range(k, k + 128)) for k in range(0, 512, 128)]
    episodes = score_episodes(setup, setup.policy, episodes, micro_batches, with_reference=True)
    exact = torch.cat([kl_of_tokens(episode, config) for episode in episodes])
    assert exact.mean() > 0.01
    for kind in ("k1", "k3"):
        config.kl_estimator = kind
        difference = torch.cat([kl_of_tokens(episode, config) for episode in episodes]) - exact
        assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5, kind


def test_a_penalty_holds_the_policy_back(run):
    free, held = (
        run("ppo", max_steps=8, learning_rate=3e-3, beta=beta, micro_batch_size=16)[1][-1] for beta in (1e-6, 5.0)
    )
    assert held["objective/kl"] < 0.3 * free["objective/kl"]


def test_beta_adapts_to_the_target(run):
    _, lines = run("ppo", max_steps=5, beta=0.1, target_kl=1e-4, learning_rate=3e-3)
    betas = [line["beta"] for line in lines]
    assert betas[0] == 0.1
    assert betas[1] == pytest.approx(0.098) and betas[-1] > betas[1]  # 0 nats at first, then far beyond the target


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
            Failure(one.where, "it stalls") if self.fails(one.prompt) else completion
            for one, completion in zip(requests, done, strict=True)
        ]


def with_sampler(monkeypatch, change):
    make = loop.make_sampler
    monkeypatch.setattr(loop, "make_sampler", lambda *arguments: change(make(*arguments)))


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
    corrected = run("grpo", max_steps=1, importance_sampling_cap=2.0, max_grad_norm=0)[1][0]
    assert corrected["grad_norm"] == pytest.approx(math.exp(0.25) * plain["grad_norm"], rel=1e-4)
    capped = run("grpo", max_steps=1, importance_sampling_cap=1.1, max_grad_norm=0)[1][0]
    assert capped["grad_norm"] == pytest.approx(1.1 * plain["grad_norm"], rel=1e-4)


def test_correcting_for_a_sampler_takes_its_log_probs(run, monkeypatch):
    Shifted.shift = None
    with_sampler(monkeypatch, lambda sampler: Shifted(sampler.model, sampler.tokenizer, sampler.bf16))
    assert "sampling/kl" not in run("grpo", max_steps=1)[1][0]
    with pytest.raises(
        UsageError, match="importance_sampling_cap: the sampler returns no log-probs of its tokens; use a server"
    ):
        run("grpo", importance_sampling_cap=2.0)


# --- options and bad input


def test_completions_that_did_not_end(run):
    """max_completion_length=2 ends none in time: they are punished, or not learned from."""
    _, lines = run("ppo", max_completion_length=2, missing_eos_penalty=1.0, lam=1.0)
    assert lines[0]["completions/clipped_ratio"] == 1.0 and lines[0]["val/num_eos_tokens"] == 0
    assert lines[0]["val/returns"] == pytest.approx(lines[0]["reward"] - 1.0, abs=1e-5)
    _, lines = run("grpo", max_completion_length=2, mask_truncated_completions=True)
    assert "loss" not in lines[0]  # there was nothing to learn


def test_the_reward_of_tokens(task):
    """-beta KL at each, and at the last the score: clipped, and less where the completion did not end."""
    config = PPOConfig(**task | {"output_dir": "out"}, reward_clip=1.0, missing_eos_penalty=0.5)
    zeros, kl = torch.zeros(2), torch.tensor([0.3, -0.1])
    episodes = [
        Episode(1, [0], [1, 2], True, 4.0, None, kl, zeros),
        Episode(2, [0], [1], False, -0.2, None, kl[:1], zeros[:1]),
    ]
    expected = torch.tensor([[-0.03, 0.01 + 1.0], [-0.03 - 0.2 - 0.5, 0.0]])
    torch.testing.assert_close(token_rewards(episodes, config, beta=0.1), expected)
    config.kl_in = "loss"
    torch.testing.assert_close(token_rewards(episodes, config, beta=0.1), torch.tensor([[0.0, 1.0], [-0.7, 0.0]]))


@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_the_kl_in_the_reward_has_the_gradient_of_the_kl(task, kind):
    """Over all 13 completions of one or two tokens of a table of four: the mean of advantage times grad log pi is the
    gradient of E[score] - beta KL(policy || reference)."""
    torch.manual_seed(2)
    logits, ref = (
        torch.randn(5, 4, requires_grad=True),
        torch.randn(5, 4).log_softmax(-1),
    )  # before the first, behind each
    logp, beta = logits.log_softmax(-1), 0.7
    kl = (logp.exp() * (logp - ref)).sum(-1)
    config = PPOConfig(
        **task | {"output_dir": "out"}, beta=beta, kl_estimator=kind, lam=1.0, whiten_advantages=False,
    )  # fmt: skip
    ends = [[3]]  # token 3 ends
    sequences = ends + [[first, second] for first in range(3) for second in range(4)]
    episodes, chances, scores = [], [], []
    for ids in sequences:
        states = [0, *(1 + i for i in ids)][: len(ids)]
        score = float(sum(ids)) - 2.0 * (ids[0] == 1)
        logprobs, ref_logprobs = (table[states, ids].detach() for table in (logp, ref))
        episodes.append(
            Episode(1, [0], ids, True, score, None, logprobs, ref_logprobs, kl[states].detach(), torch.zeros(len(ids)))
        )
        chances.append(logp[states, ids])
        scores.append(score - beta * (chances[-1] - ref[states, ids]).sum())
    with_advantages = PPO(config).compute_advantages(episodes, beta).episodes
    total = [chance.sum().exp() for chance in chances]
    assert sum(total).item() == pytest.approx(1.0)
    aim = sum(
        (whole.detach() * chance * episode.advantages).sum()
        for whole, chance, episode in zip(total, chances, with_advantages, strict=True)
    )
    (gradient,) = torch.autograd.grad(aim, logits, retain_graph=True)
    objective = sum(whole * score for whole, score in zip(total, scores, strict=True))
    (expected,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


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
        ("grpo", {"importance_sampling_cap": 0.0}, "importance_sampling_cap must be above 0"),
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
