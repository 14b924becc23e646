"""`torch.ops.rlhf_kernels.bradley_terry_loss`: shapes for tracing, and autograd. The kernel is in csrc/preference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, label_smoothing: float, center_coefficient: float
) -> Tensor:
    """Same contract as `reference.bradley_terry_loss`, through the compiled op."""
    return torch.ops.rlhf_kernels.bradley_terry_loss(chosen, rejected, margin, label_smoothing, center_coefficient)


def _fake(chosen, *_):  # type: ignore[no-untyped-def]
    return chosen.new_empty(chosen.shape, dtype=torch.float32)


def _fake_backward(grad, chosen, *_):  # type: ignore[no-untyped-def]
    return tuple(chosen.new_empty(chosen.shape, dtype=torch.float32) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    chosen, rejected, margin = ctx.saved_tensors
    args = (grad, chosen, rejected, margin, *ctx.options)
    grad_chosen, grad_rejected = torch.ops.rlhf_kernels.bradley_terry_loss_backward(*args)
    return grad_chosen.to(chosen.dtype), grad_rejected.to(rejected.dtype), None, None, None


def _refuse_double_backward(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("bradley_terry_loss (native) is differentiable once; use backend='reference' for more")


if _extension.native_available():
    torch.library.register_fake("rlhf_kernels::bradley_terry_loss", _fake)
    torch.library.register_fake("rlhf_kernels::bradley_terry_loss_backward", _fake_backward)
    torch.library.register_autograd("rlhf_kernels::bradley_terry_loss", _backward, setup_context=_setup_context)
    torch.library.register_autograd("rlhf_kernels::bradley_terry_loss_backward", _refuse_double_backward)
