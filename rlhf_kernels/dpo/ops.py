"""`torch.ops.rlhf_kernels.dpo_loss`: shapes for tracing, and autograd. The kernel is in csrc/preference; that of
the Triton op, which has the same arguments, in triton_kernels.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _extension, _ops

# Order of `enum class PairLoss` in csrc/preference/pair_losses.h.
COMPILED_TYPES = ("sigmoid", "hinge", "ipo", "robust")


def dpo_loss(
    policy: Tensor,
    ref: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.dpo_loss` for `COMPILED_TYPES`, through the compiled op or the Triton op."""
    arguments = (policy, ref, chosen, rejected, beta, COMPILED_TYPES.index(loss_type), label_smoothing)
    if backend == "triton":
        from . import triton_ops  # takes triton

        losses, rewards = triton_ops.dpo_loss(*arguments)
    else:
        losses, rewards = torch.ops.rlhf_kernels.dpo_loss(*arguments)
    return losses, rewards.detach()


def _fake(policy, ref, chosen, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(chosen.shape, dtype=torch.float32), policy.new_empty(policy.shape, dtype=torch.float32)


def _fake_backward(grad, policy, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(policy.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]
    ctx.set_materialize_grads(False)


def _gradient(op, ctx, grad_losses, _grad_rewards):  # type: ignore[no-untyped-def]
    none = (None,) * 7
    if grad_losses is None:
        return none
    policy, ref, chosen, rejected = ctx.saved_tensors
    grad = op(grad_losses, policy, ref, chosen, rejected, *ctx.options)
    grad_ref = -grad.to(ref.dtype) if ctx.needs_input_grad[1] else None  # the losses see policy - ref only
    return (grad.to(policy.dtype), grad_ref, *none[2:])


register = functools.partial(
    _ops.register, fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, gradient=_gradient
)
if _extension.native_available():
    register("dpo_loss", "dpo_loss_backward")
