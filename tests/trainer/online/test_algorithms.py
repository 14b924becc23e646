"""Losses, advantages and metrics of PPO and GRPO, against plain statements of them."""

import pytest
import torch

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
from rlhf_trainer.online.metrics import kl_of_tokens, rollout_metrics
from rlhf_trainer.online.ppo import PPO, token_rewards
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rewards.rewards import Scores
from rlhf_trainer.rollouts.sampler import LocalSampler
from tests.trainer.online.conftest import ALGORITHMS, UNUSED


def first_batch(config, algorithm):
    """The module that trains, and the first iteration's task, as the loop makes them."""
    setup = prepare(config)
    module = make_actor_critic(setup, config) if algorithm.needs_values else setup.policy
    prompts = prompts_of_step(setup, 1)
    sampler = LocalSampler(setup.policy.model, setup.tokenizer, False)
    completions = sample_completions(setup, sampler, prompts, seed=1, source="rows")
    episodes = make_episodes(prompts, completions, compute_rewards(setup, prompts, completions))
    idle = algorithm.idle(episodes, config.beta)
    plan = plan_mini_batches(setup, episodes, range(len(episodes)), seed=1, idle=idle)
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
