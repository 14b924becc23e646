"""Proximal policy optimisation with a KL penalty (Ziegler et al., 2019, arXiv:1909.08593; Ouyang et al., 2022,
arXiv:2203.02155), from a configuration to a model folder.

    reward of token t = score of the completion, at its last token, - beta KL_t

KL_t may be estimated from the token that was drawn, or exact: then it belongs to the state before the token, whose
choice does not change it. As a reward it holds back the tokens before; for the token itself stands k1: `own_penalties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ..training.batch_plan import MicroBatch
from ..training.loop import Measured
from .advantages import gae, whiten
from .config import PPOConfig
from .critic import make_actor_critic
from .episodes import Episode
from .loop import Credited, OnlineTask, train_online
from .metrics import kl_of_tokens
from .setup import Setup, prepare


class PPOTask(OnlineTask):
    """Means are over tokens."""

    names = (
        "loss", "loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
        "val/clipfrac_avg", "val/ratio",
    )  # fmt: skip
    kl_name = "loss/kl_avg"

    def measure(self, model: nn.Module, indices: MicroBatch) -> Measured:
        config = self.config
        part, seen, kl = self.see(model, indices)
        mask, tokens = seen.mask, seen.mask.sum()
        old_logprobs = self.old_logprobs(indices, seen)
        advantages, old_values, returns = (
            self.padded(name, part, mask) for name in ("advantages", "values", "returns")
        )

        def mean(terms: Tensor) -> Tensor:
            return terms.sum() / tokens

        policy = mean(
            rk.ppo_loss(
                seen.logprobs, old_logprobs, advantages, mask, clip_low=config.clip_low, clip_high=config.clip_high
            )
        )
        values = (seen.values, old_values, returns, mask)
        value_terms = rk.value_loss(*values, clip=config.clip_value)
        value = mean(value_terms)
        entropy = mean(seen.entropy)
        loss = policy + config.vf_coef * value - config.entropy_coef * entropy
        if kl is not None:
            loss = loss + self.beta * mean(kl)

        clipped = rk.clip_fraction(seen.logprobs, old_logprobs, advantages, mask, config.clip_low, config.clip_high)
        moved = seen.logprobs.detach() - old_logprobs
        value_clipped = value_terms > rk.value_loss(*values, clip=None)
        metrics = [
            loss, policy, value, entropy, mean(0.5 * moved.square()), clipped.low + clipped.high, mean(value_clipped),
            mean(moved.exp() * mask), *([] if kl is None else [mean(kl)]),
        ]  # fmt: skip
        return Measured(loss, torch.stack([metric.detach().float() for metric in metrics]), self.tokens_of(part))


class PPO:
    """GAE over the tokens' rewards and values."""

    needs_values = True

    def credit(self, config: PPOConfig, episodes: list[Episode], beta: float) -> Credited:
        rewards, values, mask = token_rewards(episodes, config, beta), *padded_values(episodes)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        advantages -= own_penalties(episodes, config, beta)
        explained = 1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)
        metrics = {
            "val/values": values[mask].mean().item(),
            "val/returns": returns[mask].mean().item(),
            "val/explained_variance": explained.item(),
        }
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        credited = [
            episode._replace(advantages=advantages[i, : len(episode.ids)], returns=returns[i, : len(episode.ids)])
            for i, episode in enumerate(episodes)
        ]
        return Credited(credited, metrics)

    def task(self, setup: Setup, episodes: list[Episode], plan: list[list[MicroBatch]], beta: float) -> PPOTask:
        return PPOTask(setup, episodes, plan, [len(episode.ids) for episode in episodes], beta)


def token_rewards(episodes: Sequence[Episode], config: PPOConfig, beta: float) -> Tensor:
    """[B, T]: -beta KL at every token, where the KL is in the reward, and at the last one the completion's score."""
    rewards = torch.zeros(len(episodes), max(len(episode.ids) for episode in episodes))
    for row, episode in zip(rewards, episodes, strict=True):
        count = len(episode.ids)
        if beta and config.kl_in == "reward":
            row[:count] -= beta * kl_of_tokens(episode, config)
        row[count - 1] += config.score_of(episode.reward, episode.finished)
    return rewards


def own_penalties(episodes: Sequence[Episode], config: PPOConfig, beta: float) -> Tensor:
    """[B, T]: what a token's advantage loses beside its rewards: beta (k1 - KL) where the exact KL is in the reward,
    else nothing. Its mean over the tokens that might have been drawn is 0, its gradient that of the KL."""
    penalties = torch.zeros(len(episodes), max(len(episode.ids) for episode in episodes))
    if beta and config.kl_in == "reward" and config.kl_estimator == "exact":
        for row, episode in zip(penalties, episodes, strict=True):
            k1 = rk.kl_penalty(episode.logprobs, episode.ref_logprobs, "k1")
            row[: len(episode.ids)] = beta * (k1 - episode.kl)
    return penalties


def padded_values(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """(values, mask), both [B, T], aligned with `token_rewards`."""
    values = nn.utils.rnn.pad_sequence([episode.values for episode in episodes], batch_first=True)
    lengths = torch.tensor([len(episode.ids) for episode in episodes])
    return values, torch.arange(values.shape[1]) < lengths[:, None]


def train_ppo(config: PPOConfig) -> Path:
    """Trains; returns the folder that holds the policy, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    setup = prepare(config)
    if setup is None:
        return Path(config.output_dir)
    return train_online(setup, make_actor_critic(setup, config), PPO())
