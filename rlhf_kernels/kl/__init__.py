"""KL divergence between policy and reference: exact over the vocabulary, or estimated from the sampled token."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._checks import check_choice, check_floating, check_head, check_same_device, common_dtype
from .._dispatch import ready_for_native, resolve_backend
from .._logits import LMHead, Side
from . import ops, reference

__all__ = ["kl_penalty", "linear_kl"]


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "policy_ref",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Exact KL divergence per token over the whole vocabulary, from hidden states.

        policy_ref: KL(policy || ref) = sum_v p_v (log p_v - log q_v)     p = policy, q = reference
        ref_policy: KL(ref || policy) = sum_v q_v (log q_v - log p_v)

    "policy_ref" is the penalty of RLHF (the literature's reverse KL). A small KL does not cancel: at 1e-8 nats it is
    still exact to a few percent in fp32 and never negative.

    Args:
        hidden: [..., D], weight: [V, D], bias: [V] or None, of the policy; the gradient goes to these.
        ref_hidden: [..., D'], ref_weight: [V, D'], ref_bias: [V] or None; D' may differ. No gradient.
        mask: [...] bool, True where the token counts; None counts all. The rest gives exactly 0, costs no matmul.
        direction: "policy_ref" or "ref_policy".
        temperature: divides both models' logits; logit_scale and logit_softcap as in `linear_logprobs`.
        ref_logit_scale, ref_logit_softcap: the reference's own; None takes the policy's.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [...] fp32 (fp64 for fp64 inputs) in nats, >= 0.

    Raises:
        ValueError: shapes or devices that do not fit, unknown direction or backend.
        TypeError: a dtype that is not supported. NotImplementedError: forward-mode differentiation (torch.func.jvp).

    Source: Kullback & Leibler (1951); the cancellation-free form is derived in `kl/reference.py`.
    """
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    ref_head = ref_head_of(head, ref_weight, ref_bias, ref_logit_scale, ref_logit_softcap)
    check_head(hidden, weight, bias)
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check_choice("direction", direction, reference.DIRECTIONS)
    check_sides(hidden, weight, ref_hidden, ref_weight, mask)
    head.check_options(temperature)
    ref_head.check_options(temperature)
    shape = hidden.shape[:-1]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    policy, ref = Side.of(hidden, head, temperature), Side.of(ref_hidden, ref_head, temperature)
    chosen = resolve_backend(backend, hidden.device, torch.promote_types(policy.gemm, ref.gemm))
    implementation = reference if chosen == "reference" else ops_of(chosen)
    return implementation.linear_kl(policy, ref, mask.reshape(-1), direction).view(shape)


def ops_of(backend: str) -> ModuleType:
    """The module that serves "native" or "triton"."""
    if backend == "triton":
        from . import triton_ops  # takes triton

        return triton_ops
    return ops


def ref_head_of(
    head: LMHead, weight: Tensor, bias: Tensor | None, logit_scale: float | None, logit_softcap: float | None
) -> LMHead:
    """The reference's head, whose scale and soft cap are the policy's where they are None."""
    return LMHead(
        weight,
        bias,
        head.logit_scale if logit_scale is None else logit_scale,
        head.logit_softcap if logit_softcap is None else logit_softcap,
    )


def check_sides(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None,
    shared: str = "a vocabulary",
) -> None:
    """Checks what the two sides and the mask must share; each side by itself was checked."""
    check_same_device(hidden=hidden, ref_hidden=ref_hidden, mask=mask)
    shape = hidden.shape[:-1]
    if ref_hidden.shape[:-1] != shape:
        raise ValueError(f"ref_hidden must be {(*shape, 'D')} like hidden, got {tuple(ref_hidden.shape)}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"policy and reference must share {shared}: weight has {weight.shape[0]} rows, "
            f"ref_weight {ref_weight.shape[0]}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)} like hidden without D, got {tuple(mask.shape)}")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1", *, backend: str = "auto") -> Tensor:
    r"""Estimates KL(policy || ref) from the log-probabilities of tokens sampled from the policy.

    With log r = ref_logprobs - logprobs:

        k1 = -log r                  unbiased, any sign: the per-token penalty of PPO
        k2 = (log r)^2 / 2           biased, >= 0
        k3 = (r - 1) - log r         unbiased, >= 0: GRPO's

    Args:
        logprobs, ref_logprobs: same shape, nats; any supported floating dtype.
        estimator: "k1", "k2" or "k3".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        The logprobs' shape, fp32 (fp64 for fp64 inputs), nats. Differentiable in both arguments. This is the gradient
        of the estimator itself; note that the expected gradient of k1 is zero and that of k3 is KL(ref || policy)'s.

    Raises:
        ValueError: shapes or devices differ, unknown estimator. TypeError: unsupported dtype.

    Source: Schulman (2020), "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    check_choice("estimator", estimator, reference.ESTIMATORS)
    if ready_for_native(backend, logprobs, ref_logprobs):
        return ops.kl_penalty(logprobs, ref_logprobs, reference.ESTIMATORS.index(estimator))
    check_floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_same_device(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs and ref_logprobs must share a shape, got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}"
        )
    dtype = common_dtype(logprobs.dtype, ref_logprobs.dtype)
    chosen = resolve_backend(backend, logprobs.device, dtype)
    if chosen != "reference":
        return ops_of(chosen).kl_penalty(logprobs, ref_logprobs, reference.ESTIMATORS.index(estimator))
    dtype = torch.promote_types(dtype, torch.float32)
    return reference.kl_penalty(logprobs.to(dtype), ref_logprobs.to(dtype), estimator)
