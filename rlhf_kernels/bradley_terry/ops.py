"""`torch.ops.rlhf_kernels.bradley_terry_loss`: shapes for tracing, and autograd. The kernel is in
csrc/preference; that of the Triton op, which has the same arguments, in triton_kernels.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _extension, _ops


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    label_smoothing: float,
    center_coefficient: float,
    backend: str = "native",
) -> Tensor:
    """Same contract as `reference.bradley_terry_loss`, through the compiled op or the Triton op."""
    arguments = (chosen, rejected, margin, label_smoothing, center_coefficient)
    if backend == "triton":
        from . import triton_ops  # takes triton

        return triton_ops.bradley_terry_loss(*arguments)
    return torch.ops.rlhf_kernels.bradley_terry_loss(*arguments)


def _fake(chosen, *_):  # type: ignore[no-untyped-def]
    return chosen.new_empty(chosen.shape, dtype=torch.float32)


def _fake_backward(grad, chosen, *_):  # type: ignore[no-untyped-def]
    return tuple(chosen.new_empty(chosen.shape, dtype=torch.float32) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gradient(op, ctx, grad):  # type: ignore[no-untyped-def]
    chosen, rejected, margin = ctx.saved_tensors
    grad_chosen, grad_rejected = op(grad, chosen, rejected, margin, *ctx.options)
    return grad_chosen.to(chosen.dtype), grad_rejected.to(rejected.dtype), None, None, None


register = functools.partial(
    _ops.register, fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, gradient=_gradient
)
if _extension.native_available():
    register("bradley_terry_loss", "bradley_terry_loss_backward")
