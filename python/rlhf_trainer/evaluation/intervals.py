"""95% intervals of shares and means over the prompts (or trials) that they were measured on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Z_95 = 1.959964  # of the normal distribution: 95% lie within so many standard deviations


class Interval(NamedTuple):
    """A measured value and the interval around it; `count`: what it was measured on."""

    value: float
    low: float
    high: float
    count: int


def wilson_interval(rate: float, count: int) -> Interval:
    """The interval of a share of `count` independent trials (Wilson, 1927): unlike rate +- error it stays within [0, 1]
    and has a width where all trials agree."""
    spread = Z_95**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt((rate * (1 - rate) + spread / 4) / count) / (1 + spread)
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half), count)


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> Interval:
    """The interval of the mean: 2.5% and 97.5% quantiles of the means of `resamples` samples with replacement."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(data), (len(data),), generator=generator) for _ in range(resamples))
    means = torch.stack([data[draw].mean() for draw in draws])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(data.mean().item(), low, high, len(data))
