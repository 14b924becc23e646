"""linear_kl and kl_penalty through Triton: the ops of csrc/bindings.cpp. linear_kl's have two arguments more: which
rows to visit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._logits import LogitTransform, Needs, Side
from .._rows import VisitedRows, rows_to_visit
from .._triton.launch import define_op
from . import triton_kernels
from .autograd import Arguments, Statistics, differentiable_twice, register_linear_kl, register_penalty


def linear_kl(policy: Side, ref: Side, mask: Tensor, direction: str) -> Tensor:
    """Same contract as `reference.linear_kl`. Logits are never kept: backward recomputes all."""
    _ops.refuse_forward_mode("linear_kl", *policy.tensors())
    arguments = Arguments.of(policy, ref, mask, direction == "policy_ref", visited=rows_to_visit(mask))
    kl, _stats, _cache = forward_op(*_ops.flat(arguments))
    return kl


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    _ops.refuse_forward_mode("kl_penalty", logprobs, ref_logprobs)
    return penalty_op(logprobs, ref_logprobs, estimator)


@define_op("triton_linear_kl")
def forward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float, temperature: float,
    gemm_dtype: torch.dtype, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, ref_logit_scale: float,
    ref_logit_softcap: float, ref_temperature: float, ref_gemm_dtype: torch.dtype, mask: Tensor, policy_ref: bool,
    kept_logits: int, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`kept_logits` is for the native op."""
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    ref_transform = LogitTransform(ref_logit_scale, ref_logit_softcap, ref_temperature)
    policy = Side.made_of(hidden, weight, bias, transform, gemm_dtype)
    ref = Side.made_of(ref_hidden, ref_weight, ref_bias, ref_transform, ref_gemm_dtype)
    kl, stats = triton_kernels.forward(policy, ref, mask, index, policy_ref)
    return kl, stats, hidden.new_empty(0, dtype=torch.float32)


@define_op("triton_linear_kl_backward")
def backward_op(
    grad_kl: Tensor, kl: Tensor, stats: Tensor, logit_cache: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, logit_scale: float, logit_softcap: float, temperature: float, gemm_dtype: torch.dtype,
    ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, ref_logit_scale: float, ref_logit_softcap: float,
    ref_temperature: float, ref_gemm_dtype: torch.dtype, mask: Tensor, policy_ref: bool, need_hidden: bool,
    need_weight: bool, need_bias: bool, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    ref_transform = LogitTransform(ref_logit_scale, ref_logit_softcap, ref_temperature)
    policy = Side.made_of(hidden, weight, bias, transform, gemm_dtype)
    ref = Side.made_of(ref_hidden, ref_weight, ref_bias, ref_transform, ref_gemm_dtype)
    return triton_kernels.backward(
        grad_kl, Statistics(kl, stats, logit_cache), policy, ref, mask, VisitedRows(index, masked), policy_ref,
        Needs(need_hidden, need_weight, need_bias),
    )  # fmt: skip


@differentiable_twice
@define_op("triton_kl_penalty")
def penalty_op(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return triton_kernels.estimate_kl(logprobs, ref_logprobs, estimator)


@define_op("triton_kl_penalty_backward")
def penalty_backward_op(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return triton_kernels.estimate_kl_backward(grad, logprobs, ref_logprobs, estimator)


register_linear_kl("triton_linear_kl", "triton_linear_kl_backward")
register_penalty("triton_kl_penalty", "triton_kl_penalty_backward")
