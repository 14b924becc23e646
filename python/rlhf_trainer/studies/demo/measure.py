"""The demo's measurements of a model on prompts that no stage learned from, and their report."""

import math
import textwrap
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.encoding import Codec, encode_pairs, encode_prompt
from ...data.examples import Group
from ...evaluation.report import filled
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

    reviews: list[str]  # one of each prompt, which may be there several times
    rewards: list[int]  # hidden ones, of all reviews
    reward: float  # their mean
    proxy_reward: float  # the reward model's, mean
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
    seed: int,
) -> Score:
    """Measures of one review of each prompt, and of the pairs in `groups`."""
    reviews, codec = sample_reviews(model, tokenizer, prompts, seed), Codec(tokenizer)
    # An empty review has no tokens to measure; it earns no reward, and is not of the language.
    answered = [(prompt, review) for prompt, review in zip(prompts, reviews, strict=True) if review]
    pairs = [encode_pairs(codec, prompt, [("review", review)]) for prompt, review in answered]
    encoded = [(prompt, response) for prompt, (response,) in pairs]
    pad_id, device = pad_id_of(tokenizer), torch.device("cpu")
    kl = kl_of_sequences(FusedLM(model), FusedLM(reference), encoded, BATCH, pad_id)
    scores = score_sequences(reward_model, [p + r for p, r in encoded], BATCH, pad_id, device).tolist()
    rewards = list(map(hidden_reward, reviews))
    grammatical = fmean(map(is_grammatical, prompts, reviews))
    accuracy = ranking_accuracy(FusedLM(model), FusedLM(reference), tokenizer, groups)
    return Score(reviews, rewards, fmean(rewards), fmean(scores), fmean(kl), grammatical, accuracy)


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


def report_of(prompts: list[str], scores: dict[str, Score], beta: float) -> str:
    """A table with a column a model, the first one the reference, and one for the optimum of DPO's objective; and the
    first review that each model wrote for the first few prompts, with its hidden reward."""
    best_reward, best_kl = optimum(next(iter(scores.values())).rewards, beta)
    return filled(
        Path(__file__).with_name("report.txt.jinja"), prompts=prompts[:3], scores=scores, beta=beta,
        best_reward=best_reward, best_kl=best_kl, shorten=textwrap.shorten,
    )  # fmt: skip
