"""bradley_terry_loss through Triton."""

from __future__ import annotations

from torch import Tensor

from .. import _ops
from .._triton.launch import define_op
from . import triton_kernels
from .autograd import differentiable_twice, register


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    _ops.refuse_forward_mode("bradley_terry_loss", chosen, rejected)
    return forward_op(chosen, rejected, margin, label_smoothing, center_coefficient)


@differentiable_twice
@define_op("triton_bradley_terry_loss")
def forward_op(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    return triton_kernels.forward(chosen, rejected, margin, label_smoothing, center_coefficient)


@define_op("triton_bradley_terry_loss_backward")
def backward_op(
    grad_losses: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float,
    center_coefficient: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return triton_kernels.backward(grad_losses, chosen, rejected, margin, label_smoothing, center_coefficient)


register("triton_bradley_terry_loss", "triton_bradley_terry_loss_backward")
