"""Advantages from rewards: pure functions of small tensors. `mask` is True where a token counts."""

import torch
from torch import Tensor

from .config import KL_ERROR_BOUND

STD_FLOOR = 1e-4  # a group whose rewards differ by less than about this is as good as equal


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2015, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lam A_(t+1)

    rewards, values, mask: [B, T]; V and A behind the last counted token are 0: the completion's reward is all that
    there is to come, also where it was cut. Returns (advantages, returns = advantages + values), 0 where masked.
    """
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        counted = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(counted, delta + gamma * lam * following, following)
        next_value = torch.where(counted, values[:, t], next_value)
        advantages[:, t] = torch.where(counted, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """[...] to mean 0 and variance 1 over what counts, or to variance 1 around the mean that it has; 0 where masked."""
    counted = values[mask]
    if len(counted) == 0:
        return torch.zeros_like(values)
    mean = counted.mean()
    whitened = (values - mean) * torch.rsqrt(counted.var(correction=0) + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def group_advantages(rewards: Tensor, loss_type: str) -> Tensor:
    """rewards [G, K] of K completions of each of G prompts -> advantages [G, K], constants.

    dr_grpo:      r - mean over the group (Liu et al., 2025, arXiv:2503.20783)
    rloo:         r - mean of the group's others (Ahmadian et al., 2024, arXiv:2402.14740)
    reinforce:    r - mean over all
    all others:   (r - mean) / (std + 1e-4) over the group (Shao et al., 2024, arXiv:2402.03300, sec. 4.1.2, where
                  nothing is added to std)
    """
    groups = rewards.reshape(1, -1) if loss_type == "reinforce" else rewards
    centred = groups - groups.mean(1, keepdim=True)
    centred = centred.masked_fill(equal_groups(groups)[:, None], 0.0).view_as(rewards)  # however the mean is rounded
    if loss_type in ("reinforce", "dr_grpo"):
        return centred
    size = rewards.shape[1]
    if loss_type == "rloo":
        return centred * (size / (size - 1))
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


def equal_groups(rewards: Tensor) -> Tensor:
    """[G, K] -> [G] bool: whether all rewards of the group are the same, so that it teaches nothing."""
    return (rewards == rewards[:, :1]).all(1)


def adapted_beta(beta: float, kl: float, target: float, gain: float) -> float:
    """The next beta, after completions whose mean KL was `kl` nats (Ziegler et al., 2019, arXiv:1909.08593, sec. 2.2):

    e = clip((kl - target) / target, -0.2, 0.2)        beta <- beta (1 + gain e)
    """
    error = (kl - target) / target
    return beta * (1 + gain * min(max(error, -KL_ERROR_BOUND), KL_ERROR_BOUND))
