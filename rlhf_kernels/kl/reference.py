"""Exact full-vocabulary KL and the sampled-token estimators, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._logits import Side, logit_dtype, raw_logits, rounded_upcast
from .._rows import map_counted_rows

ESTIMATORS = ("k1", "k2", "k3")
DIRECTIONS = ("policy_ref", "ref_policy")


class _Expm1MinusIdentity(torch.autograd.Function):
    """A function of its own so that autograd keeps u, and not every step of the series."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        small = u.abs() < 1
        v = torch.where(small, u, 0.0)
        series = torch.full_like(v, 1.0)
        for n in range(18, 2, -1):  # Horner: 1 + v/3 (1 + v/4 (1 + ...)), times v^2 / 2
            series = 1.0 + series * v / n
        return torch.where(small, 0.5 * v * v * series, torch.expm1(torch.where(small, 0.0, u)) - u)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        return grad * torch.expm1(u)


def expm1_minus_identity(u: Tensor) -> Tensor:
    """e^u - 1 - u >= 0 without cancellation: for |u| < 1 the Taylor series u^2 (1/2! + u/3! + ... + u^16/18!)."""
    result: Tensor = _Expm1MinusIdentity.apply(u)  # type: ignore[no-untyped-call]
    return result


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman (2020), "Approximating KL Divergence", with log r = ref_logprobs - logprobs, x ~ policy:

    k1 = -log r                  unbiased, any sign
    k2 = (log r)^2 / 2           biased, >= 0
    k3 = (r - 1) - log r         unbiased, >= 0
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    return expm1_minus_identity(log_ratio)


def linear_kl(policy: Side, ref: Side, mask: Tensor, direction: str) -> Tensor:
    """mask [N] bool -> KL [N] in nats; the reference's hidden states may have another width.

    With d = log p - log q of the distribution p that weighs and the other one q:

        KL(p || q) = sum_v p_v d_v = sum_v p_v (e^(-d_v) - 1 + d_v) = sum_v (q_v - p_v + p_v d_v)

    The sums are equal because sum_v p_v e^(-d_v) = sum_v q_v = 1. Every term of the second is >= 0 and of second
    order in d, so a small KL is not the difference of large numbers; the third serves terms with |d| >= 1, where the
    second could overflow.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy.tensors(), ref.detach().tensors()
    dtype = logit_dtype(torch.promote_types(policy.gemm, ref.gemm))
    weight, bias = rounded_upcast(weight, policy.gemm), None if bias is None else bias.to(dtype)
    ref_weight, ref_bias = rounded_upcast(ref_weight, ref.gemm), None if ref_bias is None else ref_bias.to(dtype)
    transform, ref_transform = policy.transform, ref.transform

    def per_row(hidden, ref_hidden, weight, bias, ref_weight, ref_bias):  # type: ignore[no-untyped-def]
        x = raw_logits(hidden, weight, policy.gemm).to(dtype)
        y = raw_logits(ref_hidden, ref_weight, ref.gemm).to(dtype)
        log_p = transform.apply(x if bias is None else x + bias).log_softmax(-1)
        log_q = ref_transform.apply(y if ref_bias is None else y + ref_bias).log_softmax(-1)
        if direction == "ref_policy":
            log_p, log_q = log_q, log_p
        p, q = log_p.exp(), log_q.exp()
        d = torch.where(log_p.isneginf(), 0.0, log_p - log_q)  # a token that p does not allow adds q_v alone
        near = (d.abs() < 1) & ~log_p.isneginf()
        terms = torch.where(near, p * expm1_minus_identity(-torch.where(near, d, 0.0)), q - p + p * d)
        return (terms.sum(-1),)

    (kl,) = map_counted_rows(
        per_row, mask, (hidden, ref_hidden), (weight, bias, ref_weight, ref_bias), weight.shape[0], dtype,
        copies_of_logits=16,  # of two models, with their masks, and the gradients of most
    )  # fmt: skip
    return kl
