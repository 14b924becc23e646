"""The op of csrc/preference for bradley_terry_loss, in Triton."""

from __future__ import annotations

from torch import Tensor

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


ops.register("triton_bradley_terry_loss", "triton_bradley_terry_loss_backward")
