"""One rank's work on its rows of the head, by backend: statistics of their logits, and, once those of all shards are
merged, gradients. The ops serve as they are, since their backward takes the statistics as arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _ops
from .. import kl as kl_room
from .. import logprob as logprob_room
from .._logits import Gradients, Needs, Side
from .._rows import VisitedRows, is_traced_or_captured
from ..kl import autograd as kl_autograd
from ..logprob import autograd as logprob_autograd
from ..logprob.reference import OPTIONAL_OUTPUTS
from . import reference


def differentiable_once(function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of an autograd.Function behind `function`. `once_differentiable` alone lets a penalty on
    the gradient pass without its own gradient where the upstream is a constant; create_graph=True raises here."""

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
    """The dtype of a shard's statistics, and of the whole vocabulary's that gradients are made from."""
    return torch.float64 if backend == "reference" else torch.float32


def logprob_statistics(
    side: Side, targets: Tensor, wanted: tuple[str, ...], kept_logits: int, frozen: bool, backend: str
) -> tuple[list[Tensor], Tensor]:
    """targets [n], ids in this shard (any where the target is elsewhere), -1 for rows that do not count.

    Returns ([max z, log sum e^(z - max z), z_y - max z, *wanted optional outputs], each [n], of this shard alone as if
    it were the whole vocabulary), and the logits kept for backward, flat; of a `frozen` head instead of those
    d logprob / d hidden [n, D], of this shard alone too.
    """
    if side.head.weight.shape[0] == 0:
        nothing = side.hidden.new_full((side.hidden.shape[0],), -torch.inf, dtype=statistics_dtype(backend))
        return [nothing, nothing, nothing, *(torch.zeros_like(nothing) for _ in wanted)], nothing[:0]
    if backend == "reference":
        return reference.logprob_statistics(side, targets, wanted), side.hidden.new_empty(0)
    arguments = logprob_autograd.Arguments.of(side, targets, -1, wanted, kept_logits, _all_rows(side, backend))
    ops = logprob_room.ops_of(backend)
    if frozen:
        results = ops.frozen_op(*logprob_autograd.frozen_arguments(arguments))
    else:
        results = ops.forward_op(*_ops.flat(arguments))
    logprobs, max_logit, log_sum, *optional, kept = results
    # Where all logits of the shard are -inf, its log-probs are not numbers.
    target = torch.where(max_logit.isneginf(), max_logit, logprobs + log_sum)
    named = dict(zip(OPTIONAL_OUTPUTS, optional, strict=True))
    return [max_logit, log_sum, target, *(named[name] for name in wanted)], kept


def logprob_directions(
    side: Side, targets: Tensor, mine: Tensor, shares: Tensor, rank: int, target_logit: Tensor, directions: Tensor
) -> Tensor:
    """This shard's part of d logprob / d hidden [n, D] under the whole vocabulary, fp32; takes `directions`' memory.

    Those are z'_t W_t - E, with E the mean of dz/dx W under this shard's own softmax and t the target that it was
    given, whose logit is `target_logit`. With the share a = shares[rank] of the probability the part is

        z'_t W_t - a E = a directions + (1 - a) z'_t W_t     where t is the target: 1 - a is what the other shards have
                 - a E = a directions - a z'_t W_t           where that is elsewhere
    """
    if side.head.weight.shape[0] == 0:
        return torch.zeros_like(side.hidden, dtype=torch.float32)
    own, others = shares[rank], torch.cat((shares[:rank], shares[rank + 1 :])).sum(0)
    scale, softcap, temperature = side.transform
    slope = scale / temperature * torch.ones_like(own)
    if softcap:
        slope = slope * (1 - (target_logit * (temperature / softcap)) ** 2)
    of_target = slope * torch.where(mine, others, -own)
    rows = side.head.weight.detach()[targets.clamp(min=0)].to(side.gemm)
    directions = directions.mul_(own.float()[:, None]).masked_fill_((own == 0)[:, None], 0)  # all logits may be -inf
    return directions.addcmul_(of_target.float()[:, None], rows)


def logprob_gradients(
    side: Side,
    targets: Tensor,
    upstream: logprob_autograd.Upstream,
    statistics: logprob_autograd.Statistics,
    needs: Needs,
    backend: str,
) -> Gradients:
    """max_logit, log_sum, entropy [n] of `statistics` are the whole vocabulary's. Where the target is in another shard,
    `upstream.logprobs` is 0 and its share is in `upstream.log_sum` already."""
    side = _unrounded(side)
    if side.head.weight.shape[0] == 0:
        return _no_rows(side, needs)
    if backend == "reference":
        return reference.logprob_gradients(side, targets, upstream, statistics, needs)
    arguments = logprob_autograd.Arguments.of(side, targets, -1, (), visited=_all_rows(side, backend))
    flat = logprob_autograd.flat_backward(upstream, arguments, statistics, needs)
    return _needed(logprob_room.ops_of(backend).backward_op(*flat), needs)


def kl_statistics(
    policy: Side, ref: Side, mask: Tensor, policy_ref: bool, kept_logits: int, backend: str
) -> tuple[list[Tensor], Tensor]:
    """mask [n] bool. Returns statistics of the distribution that weighs (p) and the other one (q), each renormalised
    over this shard,

    [KL(p || q), max z, log sum e^(z - max z), the same two of q, centre, shift], each [n],

    with log p_v - log q_v = ((z_v - y_v) - centre) + shift; and the logits kept for backward, flat.
    """
    if policy.head.weight.shape[0] == 0:
        zero = policy.hidden.new_zeros(policy.hidden.shape[0], dtype=statistics_dtype(backend))
        nothing = zero - torch.inf
        return [zero, nothing, nothing, nothing, nothing, zero, zero], zero[:0]
    if backend == "reference":
        return reference.kl_statistics(policy, ref, policy_ref), policy.hidden.new_empty(0)
    arguments = kl_autograd.Arguments.of(policy, ref, mask, policy_ref, kept_logits, _all_rows(policy, backend))
    kl, stats, kept = kl_room.ops_of(backend).forward_op(*_ops.flat(arguments))
    return [kl, *stats.unbind(0)], kept


def kl_gradients(
    grad_kl: Tensor,
    statistics: kl_autograd.Statistics,
    policy: Side,
    ref: Side,
    mask: Tensor,
    policy_ref: bool,
    needs: Needs,
    backend: str,
) -> Gradients:
    """kl [n] and stats [6, n] (what follows the KL in `kl_statistics`) of `statistics` are the whole vocabulary's."""
    policy = _unrounded(policy)
    if policy.head.weight.shape[0] == 0:
        return _no_rows(policy, needs)
    if backend == "reference":
        return reference.kl_gradients(grad_kl, statistics, policy, ref, policy_ref, needs)
    arguments = kl_autograd.Arguments.of(policy, ref, mask, policy_ref, visited=_all_rows(policy, backend))
    flat = kl_autograd.flat_backward(grad_kl, statistics, arguments, needs)
    return _needed(kl_room.ops_of(backend).backward_op(*flat), needs)


def _unrounded(side: Side) -> Side:
    """Ops give the gradient of hidden in its dtype; a shard's is a part of a sum and must not be rounded yet."""
    return side._replace(hidden=side.hidden.to(torch.promote_types(side.hidden.dtype, torch.float32)))


def _all_rows(side: Side, backend: str) -> VisitedRows | None:
    """The Triton ops' further arguments: rows that do not count were left out before, but where a graph is traced."""
    return VisitedRows(None, is_traced_or_captured(side.hidden)) if backend == "triton" else None


def _needed(gradients: tuple[Tensor, Tensor, Tensor], needs: Needs) -> Gradients:
    return Gradients(*(grad if needed else None for grad, needed in zip(gradients, needs, strict=True)))


def _no_rows(side: Side, needs: Needs) -> Gradients:
    hidden, weight, bias = (torch.zeros_like(side.hidden if t is None else t) for t in side.tensors())
    return _needed((hidden, weight, bias), needs)
