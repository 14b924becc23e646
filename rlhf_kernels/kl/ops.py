"""`linear_kl` and `kl_penalty` as custom ops: shapes for tracing, and autograd. The kernels are in csrc/kl."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from .._logits import LogitTransform

ESTIMATORS = ("k1", "k2", "k3")
DIRECTIONS = ("policy_ref", "ref_policy")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    return torch.ops.rlhf_kernels.kl_penalty(logprobs, ref_logprobs, ESTIMATORS.index(estimator))


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gemm: torch.dtype,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_transform: LogitTransform,
    ref_gemm: torch.dtype,
    mask: Tensor,
    direction: str,
) -> Tensor:
    """Same contract as `reference.linear_kl`, through the compiled op."""
    return torch.ops.rlhf_kernels.linear_kl(
        hidden, weight, bias, *transform, gemm,
        ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach(), *ref_transform,
        ref_gemm, mask, direction == "policy_ref",
    )[0]  # fmt: skip


def _fake_kl(hidden, *_):  # type: ignore[no-untyped-def]
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.float32), hidden.new_empty((6, rows), dtype=torch.float32)


def _fake_kl_backward(grad_kl, kl, stats, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    *_, need_hidden, need_weight, need_bias = rest

    def empty_like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return hidden.new_empty(0, dtype=torch.float32)
        return tensor.new_empty(tensor.shape)

    return empty_like(hidden, need_hidden), empty_like(weight, need_weight), empty_like(bias, need_bias)


def _setup_kl(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, *options, ref_hidden, ref_weight, ref_bias = inputs[:10]
    ctx.save_for_backward(*output, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, inputs[14])
    ctx.options, ctx.ref_options, ctx.policy_ref = options, inputs[10:14], inputs[15]
    ctx.set_materialize_grads(False)


def _backward_kl(ctx, grad_kl, _grad_stats):  # type: ignore[no-untyped-def]
    none = (None,) * 16
    if grad_kl is None:
        return none
    kl, stats, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    grads = torch.ops.rlhf_kernels.linear_kl_backward(
        grad_kl, kl, stats, hidden, weight, bias, *ctx.options,
        ref_hidden, ref_weight, ref_bias, *ctx.ref_options, mask, ctx.policy_ref, *need,
    )  # fmt: skip
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)) + none[3:]


def _setup_penalty(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logprobs, ref_logprobs, ctx.estimator = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _backward_penalty(ctx, grad):  # type: ignore[no-untyped-def]
    """Every estimator depends on the difference of its arguments, so the second gradient is minus the first."""
    policy, ref = ctx.saved_tensors
    grad_policy = torch.ops.rlhf_kernels.kl_penalty_backward(grad, policy, ref, ctx.estimator)
    return grad_policy.to(policy.dtype), -grad_policy.to(ref.dtype), None


def _refuse_double_backward(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("this native op is differentiable once; use backend='reference' for second derivatives")


if _extension.native_available():
    torch.library.register_fake("rlhf_kernels::linear_kl", _fake_kl)
    torch.library.register_fake("rlhf_kernels::linear_kl_backward", _fake_kl_backward)
    torch.library.register_autograd("rlhf_kernels::linear_kl", _backward_kl, setup_context=_setup_kl)
    torch.library.register_autograd("rlhf_kernels::linear_kl_backward", _refuse_double_backward)
    for name in ("kl_penalty", "kl_penalty_backward"):
        torch.library.register_fake(
            f"rlhf_kernels::{name}", lambda x, *_: torch.empty_like(x, dtype=torch.float32).contiguous()
        )
    torch.library.register_autograd("rlhf_kernels::kl_penalty", _backward_penalty, setup_context=_setup_penalty)
    torch.library.register_autograd("rlhf_kernels::kl_penalty_backward", _refuse_double_backward)
