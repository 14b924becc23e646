"""Everything about a policy by counting: all its completions with their probabilities, so that means are sums.

The leaves of a prompt, in order: completions of 0, 1, ..., MAX_WORDS words, each length as numbers are counted (the
last word changes fastest). Shorter ones have ended; those of MAX_WORDS words need not, as the model gets no further
step. Tensors over leaves are [prompts, leaves] fp64; log-probs in nats. Their probabilities sum to 1: no policy can say
anything else.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import rlhf_kernels as rk

from ...models.fused_lm import LMHead, lm_head_of
from .language import MAX_WORDS, WORDS

W = len(WORDS)
VOCABULARY = W + 1  # the end is token 0
LEAVES = sum(W**words for words in range(MAX_WORDS + 1))


class Value(NamedTuple):
    """A policy's mean reward, and its KL(policy || reference) of a whole completion in nats."""

    reward: float
    kl: float


@torch.no_grad()
def leaf_logprobs(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Tensor:
    """log pi(leaf | prompt), [prompts, leaves]."""
    head = lm_head_of(model)
    rows = []
    for prompt in prompts:
        following = [next_logprobs(hidden, head) for hidden in states(model, prompt, MAX_WORDS - 1)]
        rows.append(leaves_of(following))
    return torch.stack(rows)


def states(model: PreTrainedModel, prompt: list[int], most_words: int, *, ended: bool = False) -> Iterator[Tensor]:
    """The hidden state after the prompt and each text of 0, 1, ..., most_words words, as numbers are counted:
    [W^words, D] each; with `ended`, at the end behind those of fewer than MAX_WORDS words. What texts share is computed
    once, and kept as keys and values."""
    ids, cache = torch.tensor([prompt]), DynamicCache(config=model.config)

    def run(ids: Tensor) -> Tensor:
        return model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    for words in range(most_words + 1):
        if words > 0:
            ids = torch.arange(1, VOCABULARY).repeat(len(ids))[:, None]
            cache.batch_repeat_interleave(W)
        hidden = run(ids)
        if ended and words < MAX_WORDS:
            hidden = run(torch.zeros(len(ids), 1, dtype=torch.int64))
            cache.crop(-1)
        yield hidden


def next_logprobs(hidden: Tensor, head: LMHead) -> Tensor:
    """log p of every token, [N, D] -> [N, V] fp64: head and softmax compute in fp64, so that probabilities sum to 1 to
    the last digits."""
    targets = torch.arange(VOCABULARY).expand(len(hidden), -1)
    options = head.options() | {"bias": None if head.bias is None else head.bias.double()}
    states = hidden.double()[:, None].expand(-1, VOCABULARY, -1)
    return rk.linear_logprobs(states, head.weight[:VOCABULARY].double(), targets, **options).logprobs


def leaves_of(following: Sequence[Tensor]) -> Tensor:
    """log p of next tokens, [W^words, V] for each number of words -> log p of all leaves, [leaves]."""
    ended, text = [], torch.zeros(1, dtype=torch.float64)
    for logprobs in following:
        ended.append(text + logprobs[:, 0])
        text = (text[:, None] + logprobs[:, 1:]).flatten()
    return torch.cat([*ended, text])


def value_of(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor) -> Value:
    """Sums over leaves, means over prompts; a leaf of probability 0 adds nothing."""
    probabilities = logprobs.exp()
    gains = torch.where(probabilities > 0, logprobs - ref_logprobs, 0.0)
    reward, kl = ((probabilities * what).sum(-1).mean().item() for what in (rewards, gains))
    return Value(reward, kl)


def optimum(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi* = log pi_ref + r / beta - log Z: of all policies the one with the largest E[r] - beta KL
    (Rafailov et al., 2023, arXiv:2305.18290, eq. 4)."""
    return (ref_logprobs + rewards / beta).log_softmax(-1)


def reward_at(ref_logprobs: Tensor, rewards: Tensor, kl: float) -> float:
    """The largest mean reward of any policy with this mean KL: that of the optimum whose KL it is, by bisection."""
    low, high = math.log(1e-3), math.log(1e4)  # log beta, along which KL falls
    if kl >= value_of(optimum(ref_logprobs, rewards, math.exp(low)), ref_logprobs, rewards).kl:
        return rewards.amax(-1).mean().item()
    for _ in range(40):
        middle = (low + high) / 2
        if value_of(optimum(ref_logprobs, rewards, math.exp(middle)), ref_logprobs, rewards).kl > kl:
            low = middle
        else:
            high = middle
    # The larger KL of the two that are left, so that a policy of exactly `kl` is not above the optimum.
    return value_of(optimum(ref_logprobs, rewards, math.exp(low)), ref_logprobs, rewards).reward


def best_of(ref_logprobs: Tensor, rewards: Tensor, count: int) -> Tensor:
    """log p of the best of `count` draws from the reference, [prompts, leaves]; of equal rewards any is taken.

    With F(r) the probability of a draw of reward at most r, the best has reward r with probability
    F(r)^count - F(r-)^count, which leaves of that reward share as they share the reference's.
    """
    rows = []
    for logprobs, values in zip(ref_logprobs, rewards, strict=True):
        _, level = values.unique(return_inverse=True)  # levels of reward, from the lowest
        mass = torch.zeros(int(level.max()) + 1, dtype=torch.float64).index_add_(0, level, logprobs.exp())
        upto = mass.cumsum(0)
        # F^n - F_^n = F^n (1 - (F_/F)^n), with F_/F = 1 - mass/F: no digits are lost where a level has little mass.
        log_won = count * (upto / upto[-1]).log() + (-torch.expm1(count * torch.log1p(-mass / upto))).log()
        rows.append(logprobs + (log_won - mass.log())[level])
    return torch.stack(rows)


def bound_on_best_of(count: int) -> float:
    """log n - (n - 1)/n: no best of n has a larger KL (Beirami et al., 2024, arXiv:2401.01879, theorem 1)."""
    return math.log(count) - (count - 1) / count


def effective_sample_size(rewards: Tensor, beta: float) -> float:
    """(sum w)^2 / sum w^2 of draws from the reference with w = exp(r / beta); rewards [draws]."""
    weights = (rewards / beta).softmax(0)
    return 1.0 / weights.square().sum().item()


def draw(logprobs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places of `count` leaves, drawn independently; logprobs [leaves]."""
    limits = logprobs.exp().cumsum(0)
    points = torch.rand(count, dtype=torch.float64, generator=generator) * limits[-1]
    return torch.searchsorted(limits, points, right=True).clamp(max=len(limits) - 1)
