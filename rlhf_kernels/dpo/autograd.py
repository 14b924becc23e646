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

    policy_logps: Tensor
    ref_logps: Tensor | None
    chosen_idxs: Tensor
    rejected_idxs: Tensor
    beta: float
    loss_type: int
    label_smoothing: float


def fake(policy, ref, chosen, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(chosen.shape, dtype=torch.float32), policy.new_empty(policy.shape, dtype=torch.float32)


def fake_backward(grad, policy, *_):  # type: ignore[no-untyped-def]
    return policy.new_empty(policy.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _ops.save(ctx, Arguments(*inputs))
    ctx.set_materialize_grads(False)


def _gradient(op, ctx, grad_losses, _grad_rewards):  # type: ignore[no-untyped-def]
    if grad_losses is None:
        return (None,) * len(ctx.needs_input_grad)
    arguments, _ = _ops.saved(ctx)
    policy, ref = arguments.policy_logps, arguments.ref_logps
    grad = op(grad_losses, *arguments)
    # The losses see policy - ref only.
    of_ref = None if ref is None else -grad.to(ref.dtype)
    return _ops.gradients_of(ctx, Arguments._fields, policy_logps=grad.to(policy.dtype), ref_logps=of_ref)


KERNELS = {kind.kernel: name for name, kind in reference.LOSS_TYPES.items() if kind.kernel is not None}


def _of_reference(policy: Tensor, ref: Tensor | None, chosen: Tensor, rejected: Tensor, *constants) -> Tensor:  # type: ignore[no-untyped-def]
    beta, loss_type, label_smoothing = constants
    options = reference.LossOptions(KERNELS[loss_type], beta, label_smoothing, gamma=0.0)
    return reference.dpo_loss(policy, ref, chosen, rejected, None, options)[0]


differentiable_twice = functools.partial(_ops.differentiable_twice, _of_reference)


def register(forward: str, backward: str) -> None:
    _ops.register(
        forward, backward, fake=fake, fake_backward=fake_backward, setup_context=_setup_context, gradient=_gradient
    )
