"""`rlhf frontier`: counting all completions, against the trainer's own ways to compute and to draw them."""

import math
import random

import pytest
import torch

import rlhf_kernels as rk
from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.models.kl import kl_per_sequence
from rlhf_trainer.rollouts.generation import Sampling, completion_text, generate
from rlhf_trainer.studies.frontier.exact import (
    LEAVES,
    W,
    best_of,
    bound_on_best_of,
    draw,
    effective_sample_size,
    leaf_logprobs,
    optimum,
    reward_at,
    value_of,
)
from rlhf_trainer.studies.frontier.language import (
    FOLLOWS,
    LIKED,
    MAX_WORDS,
    NO_ANSWER,
    REPEATED,
    SUITS,
    WORDS,
    all_prompts,
    gold,
    hidden_reward,
    leaf_rewards,
    make_tokenizer,
    write_completion,
)
from rlhf_trainer.studies.frontier.methods import make_model
from rlhf_trainer.studies.tiny import prefers_first
from tests.trainer.studies.leaves import leaf_text

PROMPTS = ["sun stone rain", "fire fire sea"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


def random_model(seed):
    """Far from uniform, so that a slip in the order of leaves would show."""
    torch.manual_seed(seed)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(scope="module")
def models():
    return [random_model(seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def leaves(models, ids):
    return [leaf_logprobs(model, ids) for model in models]


@pytest.fixture(scope="module")
def rewards():
    return torch.stack([leaf_rewards(prompt) for prompt in PROMPTS])


def places(count, seed=0):
    rng = random.Random(seed)
    return [*range(1 + W + 2), *rng.sample(range(LEAVES), count)]


def ids_of_leaf(tokenizer, leaf):
    ids = tokenizer(leaf_text(leaf)).input_ids
    return ids if len(ids) == MAX_WORDS else [*ids, tokenizer.eos_token_id]


def test_every_completion_is_one_leaf():
    texts = [leaf_text(leaf) for leaf in range(LEAVES)]
    assert len(set(texts)) == LEAVES == 1 + 10 + 100 + 1000 + 10_000
    assert texts[0] == "" and texts[1] == WORDS[0] and texts[-1] == " ".join([WORDS[-1]] * MAX_WORDS)


def test_the_probabilities_of_all_leaves_sum_to_one(leaves):
    for logprobs in leaves:
        assert logprobs.dtype == torch.float64
        assert (logprobs.exp().sum(-1) - 1).abs().max() < 1e-12


def test_a_leaf_has_the_log_prob_that_the_trainer_computes_for_its_text(models, leaves, tokenizer, ids):
    for model, logprobs in zip(models, leaves, strict=True):
        fused = FusedLM(model)
        for row, prompt in zip(logprobs, ids, strict=True):
            chosen = places(200)
            batch = pad_sequences([(prompt, ids_of_leaf(tokenizer, leaf)) for leaf in chosen], pad_id=0)

            def use(hidden, head, batch=batch):
                return rk.sequence_logprobs(hidden, head.weight, batch.labels, **head.options()).logprobs

            with torch.no_grad():
                torch.testing.assert_close(row[chosen].float(), fused(batch, use), rtol=1e-5, atol=2e-5)


def test_the_sum_over_leaves_is_the_expected_exact_kl_of_the_tokens(models, leaves, tokenizer, ids):
    """KL of whole completions = E_pi sum_t KL(pi(. | s_t) || pi_ref(. | s_t)), with the trainer's KL per token."""
    policy, reference = map(FusedLM, models)
    batch = pad_sequences([(ids[0], ids_of_leaf(tokenizer, leaf)) for leaf in range(LEAVES)], pad_id=0)
    of_tokens = kl_per_sequence(policy, reference, batch).double()
    expected = (leaves[0][0].exp() * of_tokens).sum().item()
    kl = value_of(leaves[0][:1], leaves[1][:1], torch.zeros(1, LEAVES)).kl
    assert kl > 0.5  # they differ
    assert kl == pytest.approx(expected, rel=1e-4)


def test_what_the_trainer_draws_has_the_mean_that_is_counted(models, leaves, tokenizer, ids, rewards):
    draws = 4000
    completions = generate(models[0], tokenizer, [ids[0]] * draws, Sampling(MAX_WORDS), batch_size=2000, seed=1)
    drawn = torch.tensor(gold([PROMPTS[0]] * draws, [completion_text(tokenizer, c, ids[0]) for c in completions]))
    exact = value_of(leaves[0][:1], leaves[0][:1], rewards[:1])
    assert abs(drawn.mean() - exact.reward) < 4 * drawn.std() / math.sqrt(draws)
    assert exact.kl == 0


def test_the_reward_of_a_leaf_is_that_of_its_text(rewards):
    for row, prompt in zip(rewards, PROMPTS, strict=True):
        expected = [hidden_reward(prompt, leaf_text(leaf)) for leaf in places(300)]
        torch.testing.assert_close(row[places(300)], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert hidden_reward(PROMPTS[0], "") == NO_ANSWER


def test_the_reward_depends_on_the_prompt():
    """On its second word with every word, on its third with the first one, and not on its first."""
    a, b, c = (hidden_reward(prompt, "moon bird") for prompt in ("sun sun sun", "sun sea sun", "sea sun sun"))
    assert a != b and a == c
    assert hidden_reward("sun sun sea", "moon bird") != a


def test_a_repeated_word_costs_wherever_it_stood():
    def cost(text):
        """The cost of the last word's second time, against the same words where their worth is counted by hand."""
        words = [WORDS.index(word) for word in text.split()]
        before = [WORDS.index("sun"), *words[:-1]]
        worth = sum(LIKED[w] + SUITS[WORDS.index("sea")][w] + FOLLOWS[b][w] for b, w in zip(before, words, strict=True))
        return hidden_reward("sun sea sun", text) - worth

    assert cost("moon bird") == pytest.approx(0)
    assert cost("moon moon") == pytest.approx(REPEATED)
    assert cost("moon bird moon bird") == pytest.approx(2 * REPEATED)
    assert cost("moon moon moon") == pytest.approx(2 * REPEATED)
    assert cost("sun sea") == pytest.approx(0)  # the prompt's words may be repeated


def test_the_language_is_short_and_has_every_word_but_hardly_twice():
    rng = random.Random(0)
    texts = [write_completion(prompt, rng) for prompt in all_prompts()]
    again = sum(len(set(text.split())) < len(text.split()) for text in texts) / len(texts)
    assert 0 < again < 0.05
    assert {len(text.split()) for text in texts} == {2, 3, 4}
    assert {word for text in texts for word in text.split()} == set(WORDS)


def test_the_annotator_errs_as_bradley_and_terry_have_it():
    rng = random.Random(0)
    wins = sum(prefers_first(1.0, 0.0, rng) for _ in range(4000)) / 4000
    assert abs(wins - 1 / (1 + math.exp(-1))) < 0.03


# --- the optimum


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_is_worth_beta_log_z(leaves, rewards, beta):
    """max E[r] - beta KL = beta log E_ref exp(r / beta)."""
    value = value_of(optimum(leaves[0], rewards, beta), leaves[0], rewards)
    log_z = (leaves[0] + rewards / beta).logsumexp(-1).mean().item()
    assert value.reward - beta * value.kl == pytest.approx(beta * log_z, rel=1e-9)


def test_no_policy_is_above_the_frontier(leaves, rewards):
    ref = leaves[0]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(ref.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    policies = [leaves[1]] + [best_of(ref, rewards, count) for count in (2, 16, 1000)]
    for beta in (0.05, 0.3, 1.0):
        policies += [(ref + (rewards + size * n) / beta).log_softmax(-1) for n in noise for size in (0.01, 0.3, 2.0)]
    for policy in policies:
        value = value_of(policy, ref, rewards)
        assert value.reward <= reward_at(ref, rewards, value.kl) + 1e-9


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_optimum_lies_on_the_frontier(leaves, rewards, beta):
    value = value_of(optimum(leaves[0], rewards, beta), leaves[0], rewards)
    assert reward_at(leaves[0], rewards, value.kl) == pytest.approx(value.reward, abs=1e-8)


def test_beyond_all_kl_the_frontier_is_the_best_completion(leaves, rewards):
    assert reward_at(leaves[0], rewards, 1e3) == rewards.amax(-1).mean().item()


# --- best of n


def test_the_best_of_n_is_what_drawing_n_finds(leaves, rewards):
    count, trials = 4, 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = rewards[0][draw(leaves[0][0], count * trials, generator)].view(trials, count).amax(1)
    exact = (best_of(leaves[0], rewards, count)[0].exp() * rewards[0]).sum()
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / math.sqrt(trials)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 8192])
def test_the_best_of_n_sums_to_one_and_keeps_to_the_bound(leaves, rewards, count):
    policy = best_of(leaves[0], rewards, count)
    assert (policy.exp().sum(-1) - 1).abs().max() < 1e-9
    value = value_of(policy, leaves[0], rewards)
    assert value.kl <= bound_on_best_of(count) + 1e-9
    if count == 1:
        torch.testing.assert_close(policy, leaves[0])


def test_without_ties_among_many_the_bound_is_reached():
    many = 200_000
    uniform = torch.full((1, many), -math.log(many), dtype=torch.float64)
    rewards = torch.arange(many, dtype=torch.float64)[None]
    assert value_of(best_of(uniform, rewards, 8), uniform, rewards).kl == pytest.approx(bound_on_best_of(8), abs=1e-3)


def test_equal_rewards_share_what_they_win():
    """Two of three leaves are equally good: the best of 2 is one of them unless both draws are the bad one."""
    ref = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    best = best_of(ref, torch.tensor([[0.0, 1.0, 1.0]]), 2).exp()
    torch.testing.assert_close(best, torch.tensor([[0.25, 0.75 * 0.6, 0.75 * 0.4]], dtype=torch.float64))


# --- importance weights


def test_equal_weights_count_every_draw_and_one_large_weight_counts_one():
    assert effective_sample_size(torch.zeros(50), 0.1) == pytest.approx(50)
    assert effective_sample_size(torch.tensor([9.0] + [0.0] * 49), 0.1) == pytest.approx(1)


def test_leaves_are_drawn_as_often_as_they_are_likely():
    logprobs = torch.tensor([0.7, 0.0, 0.3], dtype=torch.float64).log()
    drawn = draw(logprobs, 10_000, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=3) / 10_000
    assert shares[1] == 0 and abs(shares[0] - 0.7) < 0.02
