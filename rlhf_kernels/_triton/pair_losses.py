"""Pairwise losses and their derivatives; the functions of csrc/preference/pair_losses.h. fp32."""

import triton
import triton.language as tl

from .maths import log1p

SIGMOID, HINGE, IPO, ROBUST = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
)  # csrc/preference/pair_losses.h


@triton.jit
def positive_part(x):
    """max(x, 0), and NaN of NaN, which tl.maximum would drop."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def minus_log_sigmoid(x):
    """log(1 + e^-x), without overflow on either side."""
    return positive_part(-x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def pair_loss(h, beta, smoothing, TYPE: tl.constexpr):
    """h: a pair's difference of log-ratios -> loss, d loss / d h."""
    mu = beta * h
    if TYPE == SIGMOID:
        loss = (1.0 - smoothing) * minus_log_sigmoid(mu) + smoothing * minus_log_sigmoid(-mu)
        slope = beta * (smoothing * sigmoid(mu) - (1.0 - smoothing) * sigmoid(-mu))
    elif TYPE == HINGE:
        loss = positive_part(1.0 - mu)
        slope = tl.where(mu < 1.0, -beta, 0.0)
    elif TYPE == IPO:
        off = h - 0.5 / beta
        loss = off * off
        slope = 2.0 * off
    else:
        scale = 1.0 / (1.0 - 2.0 * smoothing)
        loss = scale * ((1.0 - smoothing) * minus_log_sigmoid(mu) - smoothing * minus_log_sigmoid(-mu))
        slope = -scale * beta * ((1.0 - smoothing) * sigmoid(-mu) + smoothing * sigmoid(mu))
    return loss, slope
