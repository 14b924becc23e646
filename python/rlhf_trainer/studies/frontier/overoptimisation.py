"""Over-optimisation (Gao et al., 2023, arXiv:2210.10760) with nothing sampled: the best policies for a reward model.

A reward model is learned from pairs of the reference's completions, and stands for the hidden reward. The best policy
for it at each beta, pi_ref exp(proxy / beta) / Z, is known by counting; so are its reward by the model (proxy) and its
hidden reward (gold). Both are counted from the reference policy's, as a reward model knows differences only.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.scoring import value_head_of
from .exact import LEAVES, optimum, states, value_of
from .language import MAX_WORDS, NO_ANSWER

# From hardly any optimisation to nearly all that there is: a proxy of few pairs may be small.
BETAS = tuple(20.0 * 0.8**step for step in range(43))  # down to 0.0017

ROUNDING = 1e-9  # error of sums over leaves


@torch.no_grad()
def proxy_rewards(model: PreTrainedModel, prompts: Sequence[list[int]], ref_logprobs: Tensor) -> Tensor:
    """A reward model's value of every leaf, [prompts, leaves] fp64, centred: the reference's mean is 0 for each prompt.

    An answer is scored where it was in training: at the end, or at the last of MAX_WORDS words. The empty one, which it
    has never met, has NO_ANSWER here, too.
    """
    head = value_head_of(model)
    rewards = torch.full((len(prompts), LEAVES), NO_ANSWER, dtype=torch.float64)
    for row, prompt, logprobs in zip(rewards, prompts, ref_logprobs, strict=True):
        _, *answers = (head(hidden).squeeze(-1).double() for hidden in states(model, prompt, MAX_WORDS, ended=True))
        scores = torch.cat(answers)
        row[1:] = scores - (logprobs[1:].softmax(0) * scores).sum()
    return rewards


def curve(ref_logprobs: Tensor, proxy: Tensor, gold: Tensor, betas: Sequence[float] = BETAS) -> list[dict[str, float]]:
    """KL, proxy and gold reward of the best policy for the proxy at each beta."""
    rewards = {"proxy": proxy, "gold": gold}
    start = {name: value_of(ref_logprobs, ref_logprobs, values).reward for name, values in rewards.items()}
    points = []
    for beta in betas:
        policy = optimum(ref_logprobs, proxy, beta)
        gains = {name: value_of(policy, ref_logprobs, r).reward - start[name] for name, r in rewards.items()}
        points.append({"beta": beta, "kl": value_of(policy, ref_logprobs, gold).kl, **gains})
    return points


def agreement(ref_logprobs: Tensor, proxy: Tensor, gold: Tensor) -> float:
    """Correlation of proxy and gold over the reference's completions, within a prompt, mean over prompts."""
    weights = ref_logprobs.exp()
    centred = [values - (weights * values).sum(-1, keepdim=True) for values in (proxy, gold)]
    spread_proxy, spread_gold = ((weights * values.square()).sum(-1) for values in centred)
    together = (weights * centred[0] * centred[1]).sum(-1)
    return (together / (spread_proxy * spread_gold).sqrt()).mean().item()


def peak(points: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The point of the largest gold: sqrt(KL) there, gold there and at the end, and whether it falls on both sides."""
    best = max(points, key=lambda point: point["gold"])
    top, first, last = best["gold"], points[0]["gold"], points[-1]["gold"]
    inside = top > max(first, last) + ROUNDING
    return {"sqrt_kl": math.sqrt(best["kl"]), "gold": top, "gold_at_end": last, "inside": inside}
