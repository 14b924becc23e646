"""The op of csrc/preference for dpo_loss, in Triton, and its autograd."""

from __future__ import annotations

from torch import Tensor

from .. import _ops
from .._triton.launch import define_op
from . import ops, triton_kernels


@define_op("triton_dpo_loss")
def dpo_loss(
    policy_logps: Tensor, ref_logps: Tensor | None, chosen_idxs: Tensor, rejected_idxs: Tensor, beta: float,
    loss_type: int, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return triton_kernels.forward(policy_logps, ref_logps, chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing)


@define_op("triton_dpo_loss_backward")
def dpo_loss_backward(
    grad_losses: Tensor, policy_logps: Tensor, ref_logps: Tensor | None, chosen_idxs: Tensor, rejected_idxs: Tensor,
    beta: float, loss_type: int, label_smoothing: float,
) -> Tensor:  # fmt: skip
    return triton_kernels.backward(
        grad_losses, policy_logps, ref_logps, chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing
    )


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


_ops.register(
    "triton_dpo_loss", "triton_dpo_loss_backward",
    fake=ops.fake, fake_backward=ops.fake_backward, setup_context=_setup_context, gradient=_gradient,
)  # fmt: skip
