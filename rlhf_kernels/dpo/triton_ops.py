"""The op of csrc/preference for dpo_loss, in Triton."""

from __future__ import annotations

from torch import Tensor

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


ops.register("triton_dpo_loss", "triton_dpo_loss_backward")
