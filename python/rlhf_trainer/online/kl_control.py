"""The strength of the KL penalty, adapted so that the policy keeps a given distance from its reference."""

from __future__ import annotations

BOUND = 0.2


def adapted(beta: float, kl: float, target: float, gain: float) -> float:
    """The next beta, after completions whose mean KL was `kl` nats (Ziegler et al., 2019, arXiv:1909.08593, sec. 2.2):

    e = clip((kl - target) / target, -0.2, 0.2)        beta <- beta (1 + gain e)
    """
    error = (kl - target) / target
    return beta * (1 + gain * min(max(error, -BOUND), BOUND))
