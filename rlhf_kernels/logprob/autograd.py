"""Shared by the compiled and the Triton ops: arguments by name, shapes for tracing, what is saved, the gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._logits import Needs, Side
from .._rows import VisitedRows
from .reference import OPTIONAL_OUTPUTS


class Arguments(NamedTuple):
    """The forward ops' arguments, in the order of the schema in csrc/bindings.cpp. The last two are Triton's alone."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float
    temperature: float
    ignore_index: int
    gemm_dtype: torch.dtype
    entropy: bool
    is_top1: bool
    mean_logit: bool
    log_sum_sq_probs: bool
    kept_logits: int
    rows: Tensor | None = None
    masked: bool | None = None

    @classmethod
    def of(
        cls,
        side: Side,
        targets: Tensor,
        ignore_index: int,
        outputs: tuple[str, ...],
        kept_logits: int = 0,
        visited: VisitedRows | None = None,
    ) -> Arguments:
        entropy, is_top1, mean_logit, log_sum_sq_probs = (name in outputs for name in OPTIONAL_OUTPUTS)
        hidden, weight, bias = side.tensors()
        return cls(
            hidden, weight, targets, bias, *side.transform, ignore_index, side.gemm, entropy, is_top1, mean_logit,
            log_sum_sq_probs, kept_logits, *(visited or (None, None)),
        )  # fmt: skip


class Statistics(NamedTuple):
    """The forward's outputs that backward takes, of N rows; `logit_cache`: the logits kept."""

    max_logit: Tensor
    log_sum: Tensor
    entropy: Tensor
    logit_cache: Tensor


class Upstream(NamedTuple):
    """Gradients into the outputs of N rows. That of logsumexp is its log_sum's: see `_gradient`."""

    logprobs: Tensor | None
    log_sum: Tensor | None
    entropy: Tensor | None


def flat_backward(upstream: Upstream, arguments: Arguments, statistics: Statistics, needs: Needs) -> tuple:
    """The backward ops' arguments, in the order of the schema in csrc/bindings.cpp."""
    a = arguments
    return (
        *upstream, a.hidden, a.weight, a.targets, a.bias, *statistics, a.logit_scale, a.logit_softcap, a.temperature,
        a.ignore_index, a.gemm_dtype, *needs, *_ops.visited(a),
    )  # fmt: skip


def results_of(results: tuple[Tensor, ...], outputs: tuple[str, ...]) -> tuple[Tensor | None, ...]:
    """A forward op's results -> those of `reference.linear_logprobs`."""
    logprobs, max_logit, log_sum, entropy, *others, _ = results
    optional = (entropy, *(value.detach() for value in others))
    wanted = (value if name in outputs else None for name, value in zip(OPTIONAL_OUTPUTS, optional, strict=True))
    # The logsumexp's gradient travels through log_sum alone.
    return logprobs, max_logit.detach() + log_sum, *wanted


def _fake(*inputs):  # type: ignore[no-untyped-def]
    a = Arguments(*inputs)
    rows = a.hidden.shape[0]
    wanted = (True, True, True, a.entropy, a.is_top1, a.mean_logit, a.log_sum_sq_probs)
    sizes = (*(rows if want else 0 for want in wanted), a.kept_logits)
    return tuple(a.hidden.new_empty(size, dtype=torch.float32) for size in sizes)


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_logprobs, grad_log_sum, grad_entropy, hidden, weight, targets, bias, max_logit, log_sum, entropy, cache,
    logit_scale, logit_softcap, temperature, ignore_index, gemm_dtype, need_hidden, need_weight, need_bias, *visited,
):  # fmt: skip
    return _ops.fake_gradients((hidden, weight, bias), (need_hidden, need_weight, need_bias), hidden)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, max_logit, log_sum, entropy, *_, cache = output
    _ops.save(ctx, Arguments(*inputs), *Statistics(max_logit, log_sum, entropy, cache))
    ctx.set_materialize_grads(False)


def _gradient(op, ctx, grad_logprobs, grad_max_logit, grad_log_sum, grad_entropy, *_):  # type: ignore[no-untyped-def]
    """d logsumexp / d z = p: the op's (max, log_sum) pair is one quantity, and log_sum carries its gradient."""
    upstream = _upstream(ctx, grad_logprobs, grad_log_sum, grad_entropy)
    arguments, statistics = _ops.saved(ctx)
    return _head_gradients(op, ctx, upstream, arguments, Statistics(*statistics))


def _upstream(ctx, grad_logprobs, grad_log_sum, grad_entropy) -> Upstream:  # type: ignore[no-untyped-def]
    if not ctx.arguments.entropy:  # an output that is not wanted is empty, and so is the gradient that tracing gives it
        grad_entropy = None
    return Upstream(grad_logprobs, grad_log_sum, grad_entropy)


def _head_gradients(op, ctx, upstream, arguments, statistics):  # type: ignore[no-untyped-def]
    if all(gradient is None for gradient in upstream):
        return (None,) * len(ctx.needs_input_grad)
    needs = _ops.needs_of(ctx, Arguments._fields)
    hidden, weight, bias = op(*flat_backward(upstream, arguments, statistics, needs))
    return _ops.gradients_of(ctx, Arguments._fields, hidden=hidden, weight=weight, bias=bias)


register = functools.partial(
    _ops.register, fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, gradient=_gradient
)


# ---- a head that needs no gradient: forward finds d logprob / d hidden too -------------------------------------------


def frozen_arguments(arguments: Arguments) -> tuple:
    """The forward op's arguments for a frozen head: the native one's keeps no logits, and has no such argument."""
    if arguments.masked is None:
        return arguments[: Arguments._fields.index("kept_logits")]
    return _ops.flat(arguments)


def _of_frozen(inputs) -> Arguments:  # type: ignore[no-untyped-def]
    return Arguments._make(inputs if len(inputs) == len(Arguments._fields) else (*inputs, 0, None, None))


def _fake_frozen(*inputs):  # type: ignore[no-untyped-def]
    *results, _ = _fake(*_of_frozen(inputs))
    return *results, inputs[0].new_empty(inputs[0].shape, dtype=torch.float32)


def _fake_frozen_backward(grad_logprobs, directions, targets, ignore_index, dtype):  # type: ignore[no-untyped-def]
    return directions.new_empty(directions.shape, dtype=dtype)


def _setup_frozen(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _setup_context(ctx, _of_frozen(inputs), output)  # the directions are in the place of kept logits


def _frozen_gradient(any_head: str, op, ctx, grad_logprobs, grad_max_logit, grad_log_sum, grad_entropy, *_):  # type: ignore[no-untyped-def]
    """The directions serve the log-probs alone; with a gradient of another output all take the way of any head."""
    upstream = _upstream(ctx, grad_logprobs, grad_log_sum, grad_entropy)
    arguments, (max_logit, log_sum, entropy, directions) = _ops.saved(ctx)
    if upstream.logprobs is None or upstream.log_sum is not None or upstream.entropy is not None:
        statistics = Statistics(max_logit, log_sum, entropy, directions.new_empty(0))
        return _head_gradients(getattr(torch.ops.rlhf_kernels, any_head), ctx, upstream, arguments, statistics)
    hidden = op(upstream.logprobs, directions, arguments.targets, arguments.ignore_index, arguments.hidden.dtype)
    return _ops.gradients_of(ctx, Arguments._fields, hidden=hidden)


def register_frozen(forward: str, backward: str, any_head: str = "linear_logprobs_backward") -> None:
    """`any_head`: the backward op of a head that may be trained."""
    _ops.register(
        forward, backward, fake=_fake_frozen, fake_backward=_fake_frozen_backward, setup_context=_setup_frozen,
        gradient=functools.partial(_frozen_gradient, any_head),
    )  # fmt: skip
