"""`torch.ops.rlhf_kernels.dpo_loss`: shapes for tracing. Kernel and autograd are in csrc/preference; those of the
Triton op, which has the same arguments, in triton_kernels.py and triton_ops.py."""

from __future__ import annotations

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

        _ops.refuse_forward_mode("dpo_loss", policy, ref)
        losses, rewards = triton_ops.dpo_loss(*arguments)
        return losses, rewards.detach()
    return native(*arguments)


def fake(policy, ref, chosen, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(chosen.shape, dtype=torch.float32), policy.new_empty(policy.shape, dtype=torch.float32)


def fake_backward(grad, policy, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(policy.shape, dtype=torch.float32)


if _extension.native_available():
    native = torch.ops.rlhf_kernels.dpo_loss.default
    _ops.register_shapes("dpo_loss", "dpo_loss_backward", fake, fake_backward)
