"""The op of csrc/preference for bradley_terry_loss, in Triton, and its autograd."""

from __future__ import annotations

from torch import Tensor

from .. import _ops
from .._triton.launch import define_op
from . import ops, triton_kernels


@define_op("triton_bradley_terry_loss")
def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    return triton_kernels.forward(chosen, rejected, margin, label_smoothing, center_coefficient)


@define_op("triton_bradley_terry_loss_backward")
def bradley_terry_loss_backward(
    grad_losses: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float,
    center_coefficient: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return triton_kernels.backward(grad_losses, chosen, rejected, margin, label_smoothing, center_coefficient)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gradient(op, ctx, grad):  # type: ignore[no-untyped-def]
    chosen, rejected, margin = ctx.saved_tensors
    grad_chosen, grad_rejected = op(grad, chosen, rejected, margin, *ctx.options)
    return grad_chosen.to(chosen.dtype), grad_rejected.to(rejected.dtype), None, None, None


_ops.register(
    "triton_bradley_terry_loss", "triton_bradley_terry_loss_backward",
    fake=ops.fake, fake_backward=ops.fake_backward, setup_context=_setup_context, gradient=_gradient,
)  # fmt: skip
