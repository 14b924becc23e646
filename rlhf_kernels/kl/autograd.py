"""Shared by the compiled and the Triton ops: arguments by name, shapes for tracing, what is saved, and the gradient.
(The compiled kl_penalty has its autograd in csrc/kl.)"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._logits import Needs, Side
from .._rows import VisitedRows
from . import reference


class Arguments(NamedTuple):
    """linear_kl's arguments, in the order of the schema in csrc/bindings.cpp. The last two are Triton's alone."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float
    temperature: float
    gemm_dtype: torch.dtype
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    ref_logit_scale: float
    ref_logit_softcap: float
    ref_temperature: float
    ref_gemm_dtype: torch.dtype
    mask: Tensor
    policy_ref: bool
    kept_logits: int
    rows: Tensor | None = None
    masked: bool | None = None

    @classmethod
    def of(
        cls,
        policy: Side,
        ref: Side,
        mask: Tensor,
        policy_ref: bool,
        kept_logits: int = 0,
        visited: VisitedRows | None = None,
    ) -> Arguments:
        sides = ((*side.tensors(), *side.transform, side.gemm) for side in (policy, ref.detach()))
        own, other = sides
        return cls(*own, *other, mask, policy_ref, kept_logits, *(visited or (None, None)))


class Statistics(NamedTuple):
    """The forward's outputs, which backward takes: kl [N], stats [6, N], and the logits kept."""

    kl: Tensor
    stats: Tensor
    logit_cache: Tensor


def flat_backward(grad_kl: Tensor, statistics: Statistics, arguments: Arguments, needs: Needs) -> tuple:
    """linear_kl_backward's arguments, in the order of the schema in csrc/bindings.cpp."""
    *inputs, _kept_logits, _rows, _masked = arguments
    return (grad_kl, *statistics, *inputs, *needs, *_ops.visited(arguments))


def _fake_kl(*inputs):  # type: ignore[no-untyped-def]
    a = Arguments(*inputs)
    rows = a.hidden.shape[0]
    return tuple(a.hidden.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (6, rows), (a.kept_logits,)))


def _fake_kl_backward(  # type: ignore[no-untyped-def]
    grad_kl, kl, stats, cache, hidden, weight, bias, logit_scale, logit_softcap, temperature, gemm_dtype, ref_hidden,
    ref_weight, ref_bias, ref_logit_scale, ref_logit_softcap, ref_temperature, ref_gemm_dtype, mask, policy_ref,
    need_hidden, need_weight, need_bias, *visited,
):  # fmt: skip
    return _ops.fake_gradients((hidden, weight, bias), (need_hidden, need_weight, need_bias), hidden)


def _setup_kl(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _ops.save(ctx, Arguments(*inputs), *output)
    ctx.set_materialize_grads(False)


def _gradient_kl(op, ctx, grad_kl, *_):  # type: ignore[no-untyped-def]
    if grad_kl is None:
        return (None,) * len(ctx.needs_input_grad)
    arguments, statistics = _ops.saved(ctx)
    needs = _ops.needs_of(ctx, Arguments._fields)
    hidden, weight, bias = op(*flat_backward(grad_kl, Statistics(*statistics), arguments, needs))
    return _ops.gradients_of(ctx, Arguments._fields, hidden=hidden, weight=weight, bias=bias)


register_linear_kl = functools.partial(
    _ops.register, fake=_fake_kl, fake_backward=_fake_kl_backward, setup_context=_setup_kl, gradient=_gradient_kl
)


class PenaltyArguments(NamedTuple):
    """kl_penalty's arguments, in the order of the schema."""

    logprobs: Tensor
    ref_logprobs: Tensor
    estimator: int


def _penalty_of_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return reference.kl_penalty(logprobs, ref_logprobs, reference.ESTIMATORS[estimator])


differentiable_twice = functools.partial(_ops.differentiable_twice, _penalty_of_reference)


def fake_penalty(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=torch.float32).contiguous()


def _setup_penalty(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _ops.save(ctx, PenaltyArguments(*inputs))


def _gradient_penalty(op, ctx, grad):  # type: ignore[no-untyped-def]
    """Every estimator depends on the difference of its arguments, so the second gradient is minus the first."""
    arguments, _ = _ops.saved(ctx)
    policy, ref, _ = arguments
    grad_policy = op(grad, *arguments)
    return grad_policy.to(policy.dtype), -grad_policy.to(ref.dtype), None


register_penalty = functools.partial(
    _ops.register, fake=fake_penalty, fake_backward=fake_penalty, setup_context=_setup_penalty,
    gradient=_gradient_penalty,
)  # fmt: skip
