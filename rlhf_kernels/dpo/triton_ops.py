"""dpo_loss through Triton."""

from __future__ import annotations

from torch import Tensor

from .. import _ops
from .._triton.launch import define_op
from . import triton_kernels
from .autograd import differentiable_twice, register


def dpo_loss(
    policy_logps: Tensor, ref_logps: Tensor | None, chosen_idxs: Tensor, rejected_idxs: Tensor, beta: float,
    loss_type: int, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> losses [P], rewards [S] detached"""
    _ops.refuse_forward_mode("dpo_loss", policy_logps, ref_logps)
    losses, rewards = forward_op(policy_logps, ref_logps, chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing)
    return losses, rewards.detach()


@differentiable_twice
@define_op("triton_dpo_loss")
def forward_op(
    policy_logps: Tensor, ref_logps: Tensor | None, chosen_idxs: Tensor, rejected_idxs: Tensor, beta: float,
    loss_type: int, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return triton_kernels.forward(policy_logps, ref_logps, chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing)


@define_op("triton_dpo_loss_backward")
def backward_op(
    grad_losses: Tensor, policy_logps: Tensor, ref_logps: Tensor | None, chosen_idxs: Tensor, rejected_idxs: Tensor,
    beta: float, loss_type: int, label_smoothing: float,
) -> Tensor:  # fmt: skip
    return triton_kernels.backward(
        grad_losses, policy_logps, ref_logps, chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing
    )


register("triton_dpo_loss", "triton_dpo_loss_backward")
