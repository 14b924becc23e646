"""The demo's measurements of a model on prompts that no stage learned from, and their table."""

import math
import textwrap
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.encoding import Codec, encode_pairs, encode_prompt
from ...data.examples import Group
from ...models.checks import pad_id_of
from ...models.fused_lm import FusedLM
from ...models.kl import kl_of_sequences
from ...models.scoring import score_sequences
from ...offline.pair_batches import collate_groups
from ...offline.reference_logprobs import sequence_logprobs
from ...rollouts.generation import Sampling, completion_text, generate
from .language import hidden_reward, is_grammatical

BATCH = 512
MAX_NEW_TOKENS = 32


class Score(NamedTuple):
    """One model's results on held-out prompts."""

    reviews: list[list[str]]  # by prompt
    rewards: list[int]  # hidden ones, of all reviews
    scores: list[float]  # the reward model's
    kl_nats: float  # KL(model || reference) of a whole review, mean
    grammatical: float  # share of reviews that the language allows
    accuracy: float  # share of held-out pairs whose better review gets the larger implicit reward


def sample_reviews(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int, batch_size: int = BATCH
) -> list[str]:
    """One answer for each prompt, at temperature 1."""
    codec = Codec(tokenizer)
    ids = [encode_prompt(codec, prompt) for prompt in prompts]
    completions = generate(model, tokenizer, ids, Sampling(MAX_NEW_TOKENS), batch_size=batch_size, seed=seed)
    return [completion_text(tokenizer, *pair) for pair in zip(completions, ids, strict=True)]


def score(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    groups: list[Group],
    reviews_per_prompt: int,
    seed: int,
) -> Score:
    repeated = prompts * reviews_per_prompt
    reviews = sample_reviews(model, tokenizer, repeated, seed)
    # An empty review has no tokens to measure; it earns no reward, and is not of the language.
    answered = [(prompt, review) for prompt, review in zip(repeated, reviews, strict=True) if review]
    codec = Codec(tokenizer)
    pairs = [encode_pairs(codec, p, [("review", r)]) for p, r in answered]
    encoded = [(prompt, response) for prompt, (response,) in pairs]
    pad_id, device = pad_id_of(tokenizer), torch.device("cpu")
    kl = kl_of_sequences(FusedLM(model), FusedLM(reference), encoded, BATCH, pad_id)
    scores = score_sequences(reward_model, [p + r for p, r in encoded], BATCH, pad_id, device).tolist()
    right = [is_grammatical(*pair) for pair in zip(repeated, reviews, strict=True)]
    accuracy = ranking_accuracy(FusedLM(model), FusedLM(reference), tokenizer, groups)
    by_prompt = [reviews[i :: len(prompts)] for i in range(len(prompts))]
    return Score(by_prompt, list(map(hidden_reward, reviews)), scores, mean(kl), mean(right), accuracy)


def ranking_accuracy(
    policy: FusedLM, reference: FusedLM, tokenizer: PreTrainedTokenizerBase, groups: list[Group]
) -> float:
    """The share of pairs whose review of the higher hidden reward has the larger log pi - log pi_ref; a tie is half."""
    batch = collate_groups(groups, pad_id_of(tokenizer))
    gains = sequence_logprobs(policy, batch) - sequence_logprobs(reference, batch)
    gain = gains[batch.chosen_idxs] - gains[batch.rejected_idxs]
    responses = [response for group in groups for response in group.responses]
    rewards = torch.tensor(list(map(hidden_reward, map(tokenizer.decode, responses))))
    better = rewards[batch.chosen_idxs] - rewards[batch.rejected_idxs]
    return ((gain.sign() * better.sign() + 1) / 2)[better != 0].mean().item()


def optimum(rewards: list[int], beta: float) -> tuple[float, float]:
    """Mean reward and KL in nats of pi* = pi_ref exp(reward / beta) / Z, which DPO approaches (eq. 4 of its paper).

    rewards: of reviews sampled from pi_ref, which stand for it.
    """
    scaled = torch.tensor(rewards, dtype=torch.float64) / beta
    log_z = scaled.logsumexp(0) - math.log(len(rewards))
    mean = (scaled.softmax(0) * scaled).sum()
    return (beta * mean).item(), (mean - log_z).item()


def mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)


def table(scores: dict[str, Score], beta: float) -> str:
    """A column a model, the first one the reference, and one for the optimum of DPO's objective."""
    results = list(scores.values())
    best_reward, best_kl = optimum(results[0].rewards, beta)
    rows = [
        ("", *scores, "optimum"),
        ("hidden reward of a review, mean", *(f"{mean(s.rewards):+.2f}" for s in results), f"{best_reward:+.2f}"),
        ("what the reward model says, mean", *(f"{mean(s.scores):+.2f}" for s in results), ""),
        ("KL to the SFT model, nats a review", *(f"{s.kl_nats:.2f}" for s in results), f"{best_kl:.2f}"),
        ("better review of a pair recognised", *(f"{s.accuracy:.0%}" for s in results), "100%"),
        ("reviews that keep to the language", *(f"{s.grammatical:.0%}" for s in results), ""),
    ]  # fmt: skip
    lines = [f"  {name:<36}" + "".join(f"{value:>11}" for value in values) for name, *values in rows]
    note = f"  optimum: the SFT model reweighted by exp(reward / beta), beta {beta:g}, which is what DPO aims at"
    return "\n".join([lines[0], "  " + "-" * (34 + 11 * (len(scores) + 1)), *lines[1:], note])


def examples(prompts: list[str], scores: dict[str, Score], count: int = 3) -> str:
    """The first review each model wrote for the first few prompts, with its hidden reward."""
    lines = []
    for i, prompt in enumerate(prompts[:count]):
        lines.append(f"  {prompt}")
        for name, result in scores.items():
            review = result.reviews[i][0]
            lines.append(f"    {name:<10}{hidden_reward(review):+d}  {textwrap.shorten(review, 100)}")
    return "\n".join(lines)
