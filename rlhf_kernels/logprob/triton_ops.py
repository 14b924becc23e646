"""linear_logprobs through Triton: the ops of csrc/bindings.cpp with two arguments more, which rows to visit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._checks import check_target_range, wrong_targets
from .._logits import LogitTransform, Needs, Side
from .._rows import VisitedRows, rows_to_visit
from .._triton.launch import define_op
from . import triton_frozen, triton_kernels
from .autograd import Arguments, Statistics, Upstream, frozen_arguments, register, register_frozen, results_of


def linear_logprobs(
    side: Side, targets: Tensor, ignore_index: int, outputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """Same contract as `reference.linear_logprobs`. Logits are never kept: backward recomputes all."""
    _ops.refuse_forward_mode("linear_logprobs", *side.tensors())
    limits = (targets, side.head.weight.shape[0], ignore_index)
    refuse = functools.partial(check_target_range, *limits)
    visited = rows_to_visit(targets != ignore_index, wrong_targets(*limits), refuse)
    arguments = Arguments.of(side, targets, ignore_index, outputs, visited=visited)
    hidden, weight, bias = side.tensors()
    if _ops.needs_gradient(hidden) and not _ops.needs_gradient(weight, bias):
        return results_of(frozen_op(*frozen_arguments(arguments)), outputs)
    return results_of(forward_op(*_ops.flat(arguments)), outputs)


def _plain_targets(targets: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """-1 where a row does not count, `vocab` or more where a target is no token: its log-prob is NaN."""
    tokens = torch.where(targets < 0, vocab, targets)
    return torch.where(targets == ignore_index, -1, tokens).contiguous()


def _define_forward(name: str, run: Callable[..., tuple[Tensor, ...]]) -> Any:
    @define_op(name)
    def op(
        hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float,
        temperature: float, ignore_index: int, gemm_dtype: torch.dtype, entropy: bool, is_top1: bool, mean_logit: bool,
        log_sum_sq_probs: bool, kept_logits: int, index: Tensor | None, masked: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`kept_logits` is for the native op; here backward always recomputes."""
        extras = is_top1 or mean_logit or log_sum_sq_probs
        transform = LogitTransform(logit_scale, logit_softcap, temperature)
        side = Side.made_of(hidden, weight, bias, transform, gemm_dtype)
        plain = _plain_targets(targets, ignore_index, weight.shape[0])
        results = run(side, plain, index, entropy, extras)
        wanted = (True, True, True, entropy, is_top1, mean_logit, log_sum_sq_probs, True)
        return tuple(r if want else r.new_empty(0) for r, want in zip(results, wanted, strict=True))  # type: ignore[return-value]

    return op


forward_op = _define_forward("triton_linear_logprobs", triton_kernels.forward)
frozen_op = _define_forward("triton_linear_logprobs_frozen", triton_frozen.forward)


@define_op("triton_linear_logprobs_frozen_backward")
def frozen_backward_op(
    grad_logprobs: Tensor, directions: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Whatever comes in at a row that does not count, NaN too: its gradient is 0."""
    of_rows = torch.where(targets == ignore_index, 0, grad_logprobs)
    return (directions * of_rows[:, None]).to(dtype)


@define_op("triton_linear_logprobs_backward")
def backward_op(
    grad_logprobs: Tensor | None, grad_log_sum: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor,
    weight: Tensor, targets: Tensor, bias: Tensor | None, max_logit: Tensor, log_sum: Tensor, entropy: Tensor,
    logit_cache: Tensor, logit_scale: float, logit_softcap: float, temperature: float, ignore_index: int,
    gemm_dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    return triton_kernels.backward(
        Upstream(grad_logprobs, grad_log_sum, grad_entropy),
        Side.made_of(hidden, weight, bias, transform, gemm_dtype),
        _plain_targets(targets, ignore_index, weight.shape[0]),
        VisitedRows(index, masked),
        Statistics(max_logit, log_sum, entropy, logit_cache),
        Needs(need_hidden, need_weight, need_bias),
    )


register("triton_linear_logprobs", "triton_linear_logprobs_backward")
register_frozen(
    "triton_linear_logprobs_frozen", "triton_linear_logprobs_frozen_backward", "triton_linear_logprobs_backward"
)
