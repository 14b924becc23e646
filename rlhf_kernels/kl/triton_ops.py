"""The ops of csrc/kl in Triton: linear_kl with two arguments more, which rows to go over; kl_penalty as it is, with
its autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._logits import LogitTransform
from .._triton.launch import define_op
from . import ops, triton_kernels
from .triton_kernels import Side


@define_op("triton_linear_kl")
def linear_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float, temperature: float,
    gemm_dtype: torch.dtype, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, ref_logit_scale: float,
    ref_logit_softcap: float, ref_temperature: float, ref_gemm_dtype: torch.dtype, mask: Tensor, policy_ref: bool,
    kept_logits: int, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`kept_logits` is for the native op; here backward always recomputes."""
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    ref_transform = LogitTransform(ref_logit_scale, ref_logit_softcap, ref_temperature)
    kl, stats = triton_kernels.forward(
        Side(hidden, weight, bias, transform, gemm_dtype),
        Side(ref_hidden, ref_weight, ref_bias, ref_transform, ref_gemm_dtype),
        mask, index, policy_ref,
    )  # fmt: skip
    return kl, stats, hidden.new_empty(0, dtype=torch.float32)


@define_op("triton_linear_kl_backward")
def linear_kl_backward(
    grad_kl: Tensor, kl: Tensor, stats: Tensor, logit_cache: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, logit_scale: float, logit_softcap: float, temperature: float, gemm_dtype: torch.dtype,
    ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, ref_logit_scale: float, ref_logit_softcap: float,
    ref_temperature: float, ref_gemm_dtype: torch.dtype, mask: Tensor, policy_ref: bool, need_hidden: bool,
    need_weight: bool, need_bias: bool, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    ref_transform = LogitTransform(ref_logit_scale, ref_logit_softcap, ref_temperature)
    return triton_kernels.backward(
        grad_kl, kl, stats, Side(hidden, weight, bias, transform, gemm_dtype),
        Side(ref_hidden, ref_weight, ref_bias, ref_transform, ref_gemm_dtype),
        mask, index, masked, policy_ref, (need_hidden, need_weight, need_bias),
    )  # fmt: skip


@define_op("triton_kl_penalty")
def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return triton_kernels.estimate_kl(logprobs, ref_logprobs, estimator)


@define_op("triton_kl_penalty_backward")
def kl_penalty_backward(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return triton_kernels.estimate_kl_backward(grad, logprobs, ref_logprobs, estimator)


def _setup_penalty(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logprobs, ref_logprobs, ctx.estimator = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _gradient_penalty(op, ctx, grad):  # type: ignore[no-untyped-def]
    """Every estimator depends on the difference of its arguments, so the second gradient is minus the first."""
    policy, ref = ctx.saved_tensors
    grad_policy = op(grad, policy, ref, ctx.estimator)
    return grad_policy.to(policy.dtype), -grad_policy.to(ref.dtype), None


ops.register_linear_kl("triton_linear_kl", "triton_linear_kl_backward")
_ops.register(
    "triton_kl_penalty", "triton_kl_penalty_backward",
    fake=ops.fake_penalty, fake_backward=ops.fake_penalty, setup_context=_setup_penalty, gradient=_gradient_penalty,
)  # fmt: skip
