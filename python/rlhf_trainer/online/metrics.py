"""What is logged of an iteration of PPO or GRPO, under TRL's names where it has one. Means are over completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rlhf_kernels as rk

from ..rewards.rewards import Scores
from .config import OnlineConfig
from .episodes import Episode


def rollout_metrics(
    episodes: Sequence[Episode], judged: Scores, names: Sequence[str], config: OnlineConfig, beta: float
) -> dict[str, float]:
    """Of the completions as they were drawn, before they are learned from."""
    metrics = reward_metrics(judged, names) | length_metrics(episodes) | {"beta": beta}
    scores = [config.score_of(episode.reward, episode.finished) for episode in episodes]
    metrics["objective/scores"] = sum(scores) / len(scores)
    if episodes[0].ref_logprobs is not None:
        kl = torch.tensor([kl_of_tokens(episode, config).sum().item() for episode in episodes])
        penalty = beta * kl.mean().item() if config.kl_in == "reward" else 0.0
        metrics |= {
            "objective/kl": kl.mean().item(),
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": metrics["objective/scores"] - penalty,
        }
    if episodes[0].logprobs is not None:
        metrics["objective/entropy"] = -sum(episode.logprobs.sum().item() for episode in episodes) / len(episodes)
    return metrics


def kl_of_tokens(episode: Episode, config: OnlineConfig) -> Tensor:
    """[T] nats: the estimate, or the exact KL, as the configuration wants it."""
    if config.kl_estimator == "exact":
        return episode.kl
    return rk.kl_penalty(episode.logprobs, episode.ref_logprobs, config.kl_estimator)


def reward_metrics(judged: Scores, names: Sequence[str]) -> dict[str, float]:
    metrics = {"reward": judged.total.mean().item(), "reward_std": judged.total.std(correction=0).item()}
    for name, part in zip(names, judged.parts.T, strict=True):
        metrics[f"rewards/{name}/mean"] = part.mean().item()
        metrics[f"rewards/{name}/std"] = part.std(correction=0).item()
    return metrics


def length_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """In tokens, the end token included."""
    lengths = [len(episode.ids) for episode in episodes]
    ended = [len(episode.ids) for episode in episodes if episode.finished]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": sum(ended) / max(1, len(ended)),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "val/num_eos_tokens": float(len(ended)),
    }


def means_of_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over an iteration's optimizer steps; extremes where names end so."""
    if not updates:
        return {}
    folds = {"min": min, "max": max}
    found = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        fold = folds.get(name.rpartition("/")[2])
        found[name] = fold(values) if fold else sum(values) / len(values)
    return found
