"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and its relatives, from a configuration to a
model folder. Completions of one prompt are compared with each other, so no value model is needed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels as rk

from .advantages import equal_groups, group_advantages
from .algorithm import Advantages, Algorithm, EpisodeBatch
from .config import GRPOConfig, clip_range
from .episodes import Episode
from .loop import train_online
from .metrics import kl_of_tokens
from .setup import prepare


def train_grpo(config: GRPOConfig) -> Path:
    """Trains; returns the folder that holds the policy, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    setup = prepare(config)
    return Path(config.output_dir) if setup is None else train_online(setup, setup.policy, GRPO(config))


class GRPO(Algorithm):
    """Rewards are compared within the group; means are over completions or their tokens, as loss_type wants."""

    config: GRPOConfig

    @property
    def passes(self) -> int:
        return self.config.num_iterations

    def compute_advantages(self, episodes: list[Episode], beta: float) -> Advantages:
        scores = torch.tensor([self.score_of(episode, beta) for episode in episodes])
        groups = scores.view(-1, self.config.num_generations)
        advantages = group_advantages(groups, self.config.loss_type).flatten()
        metrics = {"frac_reward_zero_std": equal_groups(groups).float().mean().item()}
        return Advantages(
            [episode._replace(advantages=advantage) for episode, advantage in zip(episodes, advantages, strict=True)],
            metrics if self.config.num_generations > 1 else {},
        )

    def idle(self, episodes: list[Episode], beta: float) -> set[int]:
        if beta != 0:  # the KL has a gradient of its own, or a part in the advantages
            return set()
        return {i for i, one in enumerate(self.compute_advantages(episodes, beta).episodes) if not one.advantages}

    def score_of(self, episode: Episode, beta: float) -> float:
        """The score that the group compares, less beta times the completion's KL where that is in the reward."""
        score = self.config.score_of(episode.reward, episode.finished)
        if beta and self.config.kl_in == "reward":
            score -= beta * kl_of_tokens(episode, self.config).sum().item()
        return score

    def weights(self, episodes: Sequence[Episode]) -> list[float]:
        sizes = [episode.tokens for episode in episodes]
        mask = torch.arange(max(sizes, default=0)) < torch.tensor(sizes)[:, None]
        return rk.grpo_loss_weights(mask, self.config.loss_type).tolist()

    def loss(self, batch: EpisodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, output = self.config, batch.output
        low, high = clip_range(config.epsilon, config.epsilon_high)
        advantages = torch.stack([episode.advantages for episode in batch.episodes]).to(output.mask.device)
        ratios = (output.logprobs, batch.old_logprobs, advantages, output.mask)
        weights, weighing = self.sampler_weights(batch, advantages)
        loss = rk.grpo_loss(
            *ratios, variant=config.loss_type, kl=batch.kl, beta=0.0 if batch.kl is None else batch.beta, clip_low=low,
            clip_high=high, max_length=config.max_completion_length, weights=weights, dual_clip=config.delta,
            sapo_temperatures=(config.sapo_temperature_pos, config.sapo_temperature_neg),
        )  # fmt: skip
        clipped = rk.grpo_clip_fraction(*ratios, config.loss_type, low, high)
        metrics = {
            "loss": loss,
            "entropy": self.mean(output.entropy, output.mask),
            "clip_ratio/low_mean": clipped.low,
            "clip_ratio/high_mean": clipped.high,
            "clip_ratio/region_mean": clipped.low + clipped.high,
        } | weighing
        return loss, metrics if batch.kl is None else metrics | {"kl": self.mean(batch.kl, output.mask)}

    def mean(self, terms: Tensor, mask: Tensor) -> Tensor:
        """[S, T - 1] -> scalar: each completion's mean, weighted by its weight in the loss."""
        weights = rk.grpo_loss_weights(mask, self.config.loss_type)
        return (terms.sum(1) / mask.sum(1) * weights).sum() / weights.sum()
