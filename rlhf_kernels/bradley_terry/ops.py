"""`torch.ops.rlhf_kernels.bradley_terry_loss`: shapes for tracing. Kernel and autograd are in csrc/preference; those of
the Triton op, which has the same arguments, in triton_kernels.py and triton_ops.py."""

from __future__ import annotations

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

        _ops.refuse_forward_mode("bradley_terry_loss", chosen, rejected)
        return triton_ops.bradley_terry_loss(*arguments)
    return native(*arguments)


def fake(chosen, *_):  # type: ignore[no-untyped-def]
    return chosen.new_empty(chosen.shape, dtype=torch.float32)


def fake_backward(grad, chosen, *_):  # type: ignore[no-untyped-def]
    return tuple(chosen.new_empty(chosen.shape, dtype=torch.float32) for _ in range(2))


if _extension.native_available():
    native = torch.ops.rlhf_kernels.bradley_terry_loss.default
    _ops.register_shapes("bradley_terry_loss", "bradley_terry_loss_backward", fake, fake_backward)
