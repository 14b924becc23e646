"""What a rank does alone with its rows of the head, by backend: statistics of their logits, and, once those of all
shards are merged, gradients. The ops serve as they are, since their backward takes the statistics as arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._logits import LogitTransform
from .._rows import is_traced_or_captured
from ..logprob.reference import OPTIONAL_OUTPUTS
from . import reference

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden (fp32 or fp64, not rounded), weight, bias


class Side(NamedTuple):
    """One model on one rank: hidden [n, D], weight [V_local, D], bias [V_local] or None, what its logits are."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    gemm: torch.dtype

    def unrounded(self) -> Side:
        """Ops give the gradient of hidden in its dtype; a shard's is a part of a sum and must not be rounded yet."""
        return self._replace(hidden=self.hidden.to(torch.promote_types(self.hidden.dtype, torch.float32)))


class Upstream(NamedTuple):
    """Of each row: gradients into logprobs, logsumexp and entropy; where the target is in another shard, `logprobs`
    is 0 and its share is in `logsumexp` already."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None


def differentiable_once(function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward of an autograd.Function behind `function`. `once_differentiable` alone lets a penalty on the
    gradient pass without its own gradient where the upstream is a constant; create_graph=True raises here."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx: Any, *upstream: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"parallel.{function} is differentiable once, whatever the backend: leave out create_graph=True; "
                    f"for second derivatives pass the whole head to rlhf_kernels.{function} with backend='reference'"
                )
            return once(ctx, *upstream)

        return checked

    return decorate


def statistics_dtype(backend: str) -> torch.dtype:
    """Of a shard's statistics, and of the whole vocabulary's that gradients are made from."""
    return torch.float64 if backend == "reference" else torch.float32


def logprob_statistics(
    side: Side, targets: Tensor, wanted: tuple[str, ...], kept_logits: int, backend: str
) -> tuple[list[Tensor], Tensor]:
    """targets [n], ids in this shard (any where the target is elsewhere), -1 for rows that do not count.

    Returns ([max z, log sum e^(z - max z), z_y - max z, *wanted optional outputs], each [n], of this shard alone as if
    it were the whole vocabulary), and the logits kept for backward, flat.
    """
    if side.weight.shape[0] == 0:
        nothing = side.hidden.new_full((side.hidden.shape[0],), -torch.inf, dtype=statistics_dtype(backend))
        return [nothing, nothing, nothing, *(torch.zeros_like(nothing) for _ in wanted)], nothing[:0]
    if backend == "reference":
        return reference.logprob_statistics(side, targets, wanted), side.hidden.new_empty(0)
    flags = [name in wanted for name in OPTIONAL_OUTPUTS]
    arguments = (
        side.hidden, side.weight, targets, side.bias, *side.transform, -1, side.gemm, *flags, kept_logits
    )  # fmt: skip
    if backend == "triton":
        results = _triton(side.hidden, "logprob").linear_logprobs(*arguments, *_all_rows(side.hidden))
    else:
        results = torch.ops.rlhf_kernels.linear_logprobs(*arguments)
    logprobs, max_logit, log_sum, *optional, kept = results
    # Where all logits of the shard are -inf, its log-probs are not numbers.
    target = torch.where(max_logit.isneginf(), max_logit, logprobs + log_sum)
    named = dict(zip(OPTIONAL_OUTPUTS, optional, strict=True))
    return [max_logit, log_sum, target, *(named[name] for name in wanted)], kept


def logprob_gradients(
    side: Side,
    targets: Tensor,
    upstream: Upstream,
    max_logit: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    kept: Tensor,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> Gradients:
    """max_logit, log_sum, entropy [n]: of the whole vocabulary."""
    side = side.unrounded()
    if side.weight.shape[0] == 0:
        return _no_rows(side, needs)
    if backend == "reference":
        return reference.logprob_gradients(side, targets, upstream, max_logit, log_sum, entropy, needs)
    arguments = (
        *upstream, side.hidden, side.weight, targets, side.bias, max_logit, log_sum, entropy, kept, *side.transform, -1,
        side.gemm, *needs,
    )  # fmt: skip
    if backend == "triton":
        op = _triton(side.hidden, "logprob").linear_logprobs_backward
        return _needed(op(*arguments, *_all_rows(side.hidden)), needs)
    return _needed(torch.ops.rlhf_kernels.linear_logprobs_backward(*arguments), needs)


def kl_statistics(
    policy: Side, ref: Side, mask: Tensor, policy_ref: bool, kept_logits: int, backend: str
) -> tuple[list[Tensor], Tensor]:
    """mask [n] bool. Of the distribution that weighs (p) and the other one (q), each renormalised over this shard:

    [KL(p || q), max z, log sum e^(z - max z), the same two of q, centre, shift], each [n],

    with log p_v - log q_v = ((z_v - y_v) - centre) + shift; and the logits kept for backward, flat.
    """
    if policy.weight.shape[0] == 0:
        zero = policy.hidden.new_zeros(policy.hidden.shape[0], dtype=statistics_dtype(backend))
        nothing = zero - torch.inf
        return [zero, nothing, nothing, nothing, nothing, zero, zero], zero[:0]
    if backend == "reference":
        return reference.kl_statistics(policy, ref, policy_ref), policy.hidden.new_empty(0)
    arguments = (*_flat(policy), *_flat(ref), mask, policy_ref, kept_logits)
    if backend == "triton":
        kl, stats, kept = _triton(policy.hidden, "kl").linear_kl(*arguments, *_all_rows(policy.hidden))
    else:
        kl, stats, kept = torch.ops.rlhf_kernels.linear_kl(*arguments)
    return [kl, *stats.unbind(0)], kept


def kl_gradients(
    grad_kl: Tensor,
    kl: Tensor,
    stats: Tensor,
    kept: Tensor,
    policy: Side,
    ref: Side,
    mask: Tensor,
    policy_ref: bool,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> Gradients:
    """kl [n] and stats [6, n] (what follows the KL in `kl_statistics`): of the whole vocabulary."""
    policy = policy.unrounded()
    if policy.weight.shape[0] == 0:
        return _no_rows(policy, needs)
    if backend == "reference":
        return reference.kl_gradients(grad_kl, kl, stats, policy, ref, policy_ref, needs)
    arguments = (grad_kl, kl, stats, kept, *_flat(policy), *_flat(ref), mask, policy_ref, *needs)
    if backend == "triton":
        op = _triton(policy.hidden, "kl").linear_kl_backward
        return _needed(op(*arguments, *_all_rows(policy.hidden)), needs)
    return _needed(torch.ops.rlhf_kernels.linear_kl_backward(*arguments), needs)


def _flat(side: Side) -> tuple:
    return side.hidden, side.weight, side.bias, *side.transform, side.gemm


def _triton(hidden: Tensor, room: str) -> ModuleType:
    from ..kl import triton_ops as kl_ops  # take triton
    from ..logprob import triton_ops as logprob_ops

    return kl_ops if room == "kl" else logprob_ops


def _all_rows(hidden: Tensor) -> tuple[None, bool]:
    """The Triton ops' (index, masked): rows that do not count were left out before, but where a graph is traced."""
    return None, is_traced_or_captured(hidden)


def _needed(found: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, bool, bool]) -> Gradients:
    hidden, weight, bias = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return hidden, weight, bias


def _no_rows(side: Side, needs: tuple[bool, bool, bool]) -> Gradients:
    zeros = tuple(torch.zeros_like(side.hidden if t is None else t) for t in (side.hidden, side.weight, side.bias))
    return _needed(zeros, needs)  # type: ignore[arg-type]
