"""Proximal policy optimisation with a KL penalty (Ziegler et al., 2019, arXiv:1909.08593; Ouyang et al., 2022,
arXiv:2203.02155), from a configuration to a model folder.

    reward of token t = score of the completion, at its last token, - beta KL_t

KL_t may be estimated from the token that was drawn, or exact: then it belongs to the state before the token, whose
choice does not change it. As a reward it holds back the tokens before; the token's own advantage takes k1 instead:
`kl_baseline`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from .advantages import gae, whiten
from .algorithm import Advantages, Algorithm, EpisodeBatch
from .config import PPOConfig, clip_range
from .critic import make_actor_critic
from .episodes import Episode
from .loop import train_online
from .metrics import kl_of_tokens
from .setup import prepare


def train_ppo(config: PPOConfig) -> Path:
    """Trains; returns the folder that holds the policy, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    setup = prepare(config)
    if setup is None:
        return Path(config.output_dir)
    return train_online(setup, make_actor_critic(setup, config), PPO(config))


class PPO(Algorithm):
    """GAE over the tokens' rewards and values; means are over tokens."""

    config: PPOConfig
    needs_values = True

    @property
    def passes(self) -> int:
        return self.config.num_ppo_epochs

    def compute_advantages(self, episodes: list[Episode], beta: float) -> Advantages:
        config = self.config
        rewards, values, mask = token_rewards(episodes, config, beta), *padded_values(episodes)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        advantages -= kl_baseline(episodes, config, beta)
        explained = 1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)
        metrics = {
            "val/values": values[mask].mean().item(),
            "val/returns": returns[mask].mean().item(),
            "val/explained_variance": explained.item(),
        }
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        episodes = [
            episode._replace(advantages=advantages[i, : episode.tokens], returns=returns[i, : episode.tokens])
            for i, episode in enumerate(episodes)
        ]
        return Advantages(episodes, metrics)

    def weights(self, episodes: Sequence[Episode]) -> list[float]:
        return [episode.tokens for episode in episodes]

    def loss(self, batch: EpisodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, output, mask = self.config, batch.output, batch.output.mask
        low, high = clip_range(config.cliprange, config.cliprange_high)
        ratios = (output.logprobs, batch.old_logprobs, batch.padded("advantages"), mask)
        values = (output.values, batch.padded("values"), batch.padded("returns"), mask)

        def mean(terms: Tensor) -> Tensor:
            return terms.sum() / mask.sum()

        weights, weighing = self.sampler_weights(batch, ratios[2])
        policy_loss = mean(rk.ppo_loss(*ratios, clip_low=low, clip_high=high, dual_clip=config.delta, weights=weights))
        value_terms = rk.value_loss(*values, clip=config.cliprange_value)
        value_loss, entropy = mean(value_terms), mean(output.entropy)
        loss = policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy
        if batch.kl is not None:
            loss = loss + batch.beta * mean(batch.kl)

        clipped = rk.clip_fraction(*ratios, low, high)
        log_ratio = output.logprobs.detach() - batch.old_logprobs
        metrics = {
            "loss": loss,
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "policy/entropy_avg": entropy,
            "policy/approxkl_avg": mean(0.5 * log_ratio.square()),
            "policy/clipfrac_avg": clipped.low + clipped.high,
            "val/clipfrac_avg": mean(value_terms > rk.value_loss(*values, clip=None)),
            "val/ratio": mean(log_ratio.exp() * mask),
        } | weighing
        return loss, metrics if batch.kl is None else metrics | {"loss/kl_avg": mean(batch.kl)}


def token_rewards(episodes: Sequence[Episode], config: PPOConfig, beta: float) -> Tensor:
    """[B, T]: -beta KL at every token, where the KL is in the reward, and at the last one the completion's score."""
    rewards = torch.zeros(len(episodes), max(episode.tokens for episode in episodes))
    for row, episode in zip(rewards, episodes, strict=True):
        count = episode.tokens
        if beta and config.kl_in == "reward":
            row[:count] -= beta * kl_of_tokens(episode, config)
        row[count - 1] += config.score_of(episode.reward, episode.finished)
    return rewards


def kl_baseline(episodes: Sequence[Episode], config: PPOConfig, beta: float) -> Tensor:
    """[B, T]: what a token's advantage loses beside its rewards: beta (k1 - KL) where the exact KL is in the reward,
    else nothing. Its mean over the tokens that might have been drawn is 0, its gradient that of the KL."""
    penalties = torch.zeros(len(episodes), max(episode.tokens for episode in episodes))
    if beta and config.kl_in == "reward" and config.kl_estimator == "exact":
        for row, episode in zip(penalties, episodes, strict=True):
            k1 = rk.kl_penalty(episode.logprobs, episode.ref_logprobs, "k1")
            row[: episode.tokens] = beta * (k1 - episode.kl)
    return penalties


def padded_values(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """(values, mask), both [B, T], aligned with `token_rewards`."""
    values = nn.utils.rnn.pad_sequence([episode.values for episode in episodes], batch_first=True)
    lengths = torch.tensor([episode.tokens for episode in episodes])
    return values, torch.arange(values.shape[1]) < lengths[:, None]
