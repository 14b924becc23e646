"""`rlhf frontier`: proxies and their peaks, and a report that tells when an expectation fails."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_trainer.models.loading import save_model
from rlhf_trainer.models.scoring import load_reward_model, score_sequences
from rlhf_trainer.offline.reward_model import give_pad_token
from rlhf_trainer.studies.frontier.exact import LEAVES, leaf_logprobs, value_of
from rlhf_trainer.studies.frontier.language import MAX_WORDS, NO_ANSWER, leaf_rewards, make_tokenizer
from rlhf_trainer.studies.frontier.methods import make_model
from rlhf_trainer.studies.frontier.overoptimisation import BETAS, agreement, curve, peak, proxy_rewards
from rlhf_trainer.studies.frontier.report import (
    falls,
    grows,
    is_near,
    mean_and_error,
    none_above,
    peaks_later,
    within_bound,
)
from tests.trainer.studies.leaves import leaf_text

PROMPT = "sea wind snow"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer(PROMPT).input_ids


@pytest.fixture(scope="module")
def ref(prompt):
    torch.manual_seed(0)
    return leaf_logprobs(make_model(), [prompt])


@pytest.fixture(scope="module")
def gold():
    return leaf_rewards(PROMPT)[None]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("reward_model"), make_tokenizer()
    torch.manual_seed(1)
    save_model(make_model(), tokenizer, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    give_pad_token(model, tokenizer)
    save_model(model, tokenizer, folder)
    return load_reward_model(str(folder), key="model")


def test_a_proxy_scores_each_leaf_as_the_trainer_scores_its_text(reward_model, tokenizer, prompt, ref):
    proxy = proxy_rewards(reward_model, [prompt], ref)[0]
    chosen = [1, 5, 10, 11, 57, 110, 111, 790, 1110, 1111, 5000, LEAVES - 1]
    texts = [tokenizer(leaf_text(leaf)).input_ids for leaf in chosen]
    sequences = [prompt + (ids if len(ids) == MAX_WORDS else [*ids, 0]) for ids in texts]
    scores = score_sequences(reward_model, sequences, 4, 11, torch.device("cpu")).double()
    assert scores.std() > 0.1
    torch.testing.assert_close(proxy[chosen] - proxy[chosen[0]], scores - scores[0], rtol=1e-4, atol=1e-4)


def test_a_proxy_is_centred_where_it_was_trained(reward_model, prompt, ref):
    proxy = proxy_rewards(reward_model, [prompt], ref)[0]
    assert proxy[0] == NO_ANSWER
    assert abs((ref[0, 1:].exp() * proxy[1:]).sum()) < 1e-12


def test_the_hidden_reward_as_its_own_proxy_never_falls(ref, gold):
    points = curve(ref, gold, gold)
    assert len(points) == len(BETAS)
    assert all(point["gold"] == pytest.approx(point["proxy"]) for point in points)
    for weaker, stronger in pairwise(points):  # at its end nothing is left to gain
        assert stronger["gold"] > weaker["gold"] - 1e-12 and stronger["kl"] > weaker["kl"] - 1e-9
    assert points[-1]["gold"] > points[0]["gold"] + 1
    assert not peak(points)["inside"]
    assert agreement(ref, gold, gold) == pytest.approx(1)


def test_a_proxy_that_errs_where_the_reference_hardly_goes_is_over_optimised(ref, gold):
    proxy = gold.clone()
    bad = int((gold[0, 1:] + ref[0, 1:]).argmin()) + 1
    proxy[0, bad] = 8.0  # a bad completion that the reference hardly writes, and the model adores
    points = curve(ref, proxy, gold)
    assert all(a["proxy"] < b["proxy"] + 1e-9 for a, b in pairwise(points))
    top = peak(points)
    assert top["inside"] and top["gold_at_end"] < top["gold"] - 0.5
    best = max(points, key=lambda point: point["gold"])
    assert top["sqrt_kl"] == pytest.approx(math.sqrt(best["kl"]))
    assert agreement(ref, proxy, gold) < 1


def test_opposite_rewards_agree_not_at_all(ref, gold):
    assert agreement(ref, -gold, gold) == pytest.approx(-1)
    assert value_of(ref, ref, gold).kl == 0


# --- the report


def test_the_error_is_that_of_the_mean():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert mean_and_error([5.0]) == (5.0, 0.0)


def points(rewards_by_beta, best=2.0):
    return [
        {"method": "PPO", "beta": beta, "seed": seed, "reward": reward, "kl": reward, "best_reward": best,
         "share": reward / best, "train_seconds": 1.0, "train_cpu_seconds": 1.0}
        for beta, rewards in rewards_by_beta.items() for seed, reward in enumerate(rewards)
    ]  # fmt: skip


def test_a_model_above_the_optimum_is_reported():
    assert none_above(points({1.0: [1.0, 2.0]}))["holds"]
    expectation = none_above(points({1.0: [1.0, 2.1]}))
    assert not expectation["holds"] and "PPO, beta 1, seed 1" in expectation["found"]


def test_a_step_against_the_expectation_counts_beyond_its_error_only():
    assert grows(points({2.0: [0.5, 0.6, 0.7], 0.5: [1.0, 1.1, 1.2]}), "PPO")["holds"]
    assert grows(points({2.0: [0.5, 0.6, 0.7], 0.5: [0.4, 0.58, 0.7]}), "PPO")["holds"]
    expectation = grows(points({2.0: [0.5, 0.6, 0.7], 0.5: [0.1, 0.2, 0.3]}), "PPO")
    assert not expectation["holds"] and "reward 0.60 to 0.20 from beta 2 to 0.5" in expectation["found"]


def test_near_is_a_share_of_the_gain_at_every_beta():
    assert is_near(points({2.0: [1.9, 1.9], 0.5: [1.85, 1.85]}), "PPO")["holds"]
    assert not is_near(points({2.0: [1.9, 1.9], 0.5: [1.5, 1.5]}), "PPO")["holds"]


def test_a_best_of_n_beyond_its_bound_is_reported():
    assert within_bound([{"n": 2, "kl": 0.19, "kl_bound": 0.1931}])["holds"]
    assert not within_bound([{"n": 2, "kl": 0.20, "kl_bound": 0.1931}])["holds"]


def runs(pairs, places, fall):
    return [
        {"pairs": pairs, "peak": {"sqrt_kl": place, "gold": 1.0, "gold_at_end": 1.0 - fall, "inside": fall > 0}}
        for place in places
    ]


def test_gold_that_only_rises_and_peaks_that_do_not_move_are_reported():
    assert falls(runs(200, [1.0, 1.1], 0.4), 200)["holds"]
    assert not falls(runs(200, [1.0, 1.1], 0.0), 200)["holds"]
    both = runs(200, [1.0, 1.1], 0.4) + runs(2000, [2.0, 2.1], 0.4)
    assert peaks_later(both, 200, 2000)["holds"]
    assert not peaks_later(runs(200, [1.0, 2.0], 0.4) + runs(2000, [1.1, 2.1], 0.4), 200, 2000)["holds"]
