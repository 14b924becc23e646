"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and its relatives, from a configuration to a
model folder. Completions of one prompt are compared with each other, so no value model is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ..errors import UsageError
from ..training.batch_plan import MicroBatch
from ..training.loop import Measured
from .advantages import equal_groups, group_advantages
from .config import GRPOConfig
from .episodes import Episode, Seen, padded
from .loop import Credited, OnlineTask, train_online
from .metrics import kl_of_tokens
from .setup import Setup, prepare


class GRPOTask(OnlineTask):
    """Means are over completions or over their tokens, as the variant's are."""

    names = ("loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    kl_name = "kl"

    def measure(self, model: nn.Module, indices: MicroBatch) -> Measured:
        config = self.config
        part, seen, kl = self.see(model, indices)
        old_logprobs = self.old_logprobs(indices, seen)
        advantages = torch.stack([episode.advantages for episode in part]).to(self.device)
        loss = rk.grpo_loss(
            seen.logprobs, old_logprobs, advantages, seen.mask, variant=config.variant, kl=kl,
            beta=0.0 if kl is None else self.beta, clip_low=config.clip_low, clip_high=config.clip_high,
            sampler_logprobs=self.sampler_logprobs(part, seen, old_logprobs), is_cap=config.is_cap,
            max_length=config.max_new_tokens,
        )  # fmt: skip
        clipped = rk.grpo_clip_fraction(
            seen.logprobs, old_logprobs, advantages, seen.mask, config.variant, config.clip_low, config.clip_high
        )
        entropy = self.mean(seen.entropy, seen.mask)
        metrics = [loss, entropy, clipped.low, clipped.high, clipped.low + clipped.high]
        if kl is not None:
            metrics.append(self.mean(kl, seen.mask))
        return Measured(loss, torch.stack([metric.detach().float() for metric in metrics]), self.tokens_of(part))

    def sampler_logprobs(self, part: list[Episode], seen: Seen, old_logprobs: Tensor) -> Tensor | None:
        """Where the loss corrects for the sampler; a completion whose log-probs it did not tell has weight 1."""
        if self.config.is_cap is None:
            return None
        unknown = [torch.full((len(episode.ids),), torch.nan) for episode in part]
        known = [u if e.sampler_logprobs is None else e.sampler_logprobs for e, u in zip(part, unknown, strict=True)]
        rows = padded(known, seen.mask)
        return torch.where(rows.isnan(), old_logprobs, rows)

    def mean(self, terms: Tensor, mask: Tensor) -> Tensor:
        """[S, T - 1] -> scalar: each completion's mean, weighted by what it counts for in the loss."""
        counts = rk.grpo_counts(mask, self.config.variant)
        return (terms.sum(1) / mask.sum(1) * counts).sum() / counts.sum()


class GRPO:
    """Rewards relative to those of the group."""

    needs_values = False

    def credit(self, config: GRPOConfig, episodes: list[Episode], beta: float) -> Credited:
        if config.is_cap is not None and all(episode.sampler_logprobs is None for episode in episodes):
            raise UsageError(
                "is_cap: the sampler tells no log-probs of its tokens; use a server that does, or leave is_cap out"
            )
        rewards = torch.tensor([score_of(episode, config, beta) for episode in episodes])
        groups = rewards.view(-1, config.num_generations)
        advantages = group_advantages(groups, config.variant).flatten()
        credited = [
            episode._replace(advantages=advantage) for episode, advantage in zip(episodes, advantages, strict=True)
        ]
        compared = {"frac_reward_zero_std": equal_groups(groups).float().mean().item()}
        return Credited(credited, compared if config.num_generations > 1 else {})

    def task(self, setup: Setup, episodes: list[Episode], plan: list[list[MicroBatch]], beta: float) -> GRPOTask:
        sizes = [len(episode.ids) for episode in episodes]
        mask = torch.arange(max(sizes, default=0)) < torch.tensor(sizes)[:, None]
        counts = rk.grpo_counts(mask, setup.config.variant).tolist()
        return GRPOTask(setup, episodes, plan, counts, beta)


def score_of(episode: Episode, config: GRPOConfig, beta: float) -> float:
    """What the group compares: the score, less beta times the completion's KL where that is in the reward."""
    score = config.score_of(episode.reward, episode.finished)
    if beta and config.kl_in == "reward":
        score -= beta * kl_of_tokens(episode, config).sum().item()
    return score


def train_grpo(config: GRPOConfig) -> Path:
    """Trains; returns the folder that holds the policy, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    setup = prepare(config)
    return Path(config.output_dir) if setup is None else train_online(setup, setup.policy, GRPO())
