"""The metrics of an iteration of PPO or GRPO, under TRL's names where it has one. Means are over completions."""

from collections.abc import Sequence

import torch
from torch import Tensor

import rlhf_kernels as rk

from ..rewards.rewards import Scores
from ..training.task import Metrics
from .config import OnlineConfig
from .episodes import Episode


def rollout_metrics(
    episodes: Sequence[Episode], scores: Scores, names: Sequence[str], config: OnlineConfig, beta: float
) -> Metrics:
    """Metrics of the completions as they were drawn. Their log-probs may be known only after the policy has learned
    from them, and not to a process that learned from a part of them: then there is no entropy."""
    metrics = reward_metrics(scores, names) | length_metrics(episodes) | {"beta": beta}
    clipped = [config.score_of(episode.reward, episode.finished) for episode in episodes]
    metrics["objective/scores"] = sum(clipped) / len(clipped)
    if episodes[0].ref_logprobs is not None:
        kl = torch.tensor([kl_of_tokens(episode, config).sum().item() for episode in episodes])
        penalty = beta * kl.mean().item() if config.kl_in == "reward" else 0.0
        metrics |= {
            "objective/kl": kl.mean().item(),
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": metrics["objective/scores"] - penalty,
        }
    if all(episode.logprobs is not None for episode in episodes):
        metrics["objective/entropy"] = -sum(episode.logprobs.sum().item() for episode in episodes) / len(episodes)
    return metrics


def kl_of_tokens(episode: Episode, config: OnlineConfig) -> Tensor:
    """[T] nats: the estimate, or the exact KL, by kl_estimator."""
    if config.kl_estimator == "exact":
        return episode.kl
    return rk.kl_penalty(episode.logprobs, episode.ref_logprobs, config.kl_estimator)


def reward_metrics(scores: Scores, names: Sequence[str]) -> Metrics:
    """Means and deviations of the rewards, and of each function's where it has not abstained."""
    metrics = {"reward": scores.total.mean().item(), "reward_std": scores.total.std(correction=0).item()}
    for name, column in zip(names, scores.parts.T, strict=True):
        part = column[~column.isnan()]
        if len(part):
            metrics[f"rewards/{name}/mean"] = part.mean().item()
            metrics[f"rewards/{name}/std"] = part.std(correction=0).item()
    return metrics


def length_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Lengths of completions in tokens, the end token included."""
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


def means_of_updates(updates: Sequence[Metrics]) -> Metrics:
    """Means over an iteration's optimizer steps."""
    return {name: sum(update[name] for update in updates) / len(updates) for name in (updates[0] if updates else ())}
