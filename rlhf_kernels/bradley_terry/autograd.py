"""Shapes for tracing, shared by the compiled and the Triton op; and the Triton op's gradient and what it saves. (Those
of the compiled one are in csrc/preference.)"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops
from . import reference


class Arguments(NamedTuple):
    """The op's arguments, in the order of the schema in csrc/bindings.cpp."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None
    label_smoothing: float
    center_coefficient: float


def fake(chosen, *_):  # type: ignore[no-untyped-def]
    return chosen.new_empty(chosen.shape, dtype=torch.float32)


def fake_backward(grad, chosen, *_):  # type: ignore[no-untyped-def]
    return tuple(chosen.new_empty(chosen.shape, dtype=torch.float32) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _ops.save(ctx, Arguments(*inputs))


def _gradient(op, ctx, grad):  # type: ignore[no-untyped-def]
    arguments, _ = _ops.saved(ctx)
    chosen, rejected = op(grad, *arguments)
    return _ops.gradients_of(
        ctx, Arguments._fields, chosen=chosen.to(arguments.chosen.dtype), rejected=rejected.to(arguments.rejected.dtype)
    )


differentiable_twice = functools.partial(_ops.differentiable_twice, reference.bradley_terry_loss)


def register(forward: str, backward: str) -> None:
    _ops.register(
        forward, backward, fake=fake, fake_backward=fake_backward, setup_context=_setup_context, gradient=_gradient
    )
