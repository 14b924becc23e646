"""Vocabulary-parallel `linear_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _workspace
from .._checks import FLOATS, check_choice, check_target_range, check_targets
from .._dispatch import BACKENDS, resolve_backend
from .._logits import Gradients, LMHead, LogitTransform, Needs, Side, logit_dtype
from .._ops import needs_gradient
from .._rows import is_traced_or_captured
from ..logprob import LinearLogprobs
from ..logprob.autograd import Statistics, Upstream
from ..logprob.reference import OPTIONAL_OUTPUTS
from .backends import differentiable_once, logprob_directions, logprob_gradients, logprob_statistics, statistics_dtype
from .merge import merge_logprobs
from .rows import CountedRows
from .shards import LocalHead, Shards, agreed, fingerprint, gather, local_head


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> LinearLogprobs:
    r"""`rlhf_kernels.linear_logprobs` over a head whose rows are split over the ranks of a group.

    Args:
        hidden: [..., D], replicated. targets: [...] int64 ids of the whole vocabulary, replicated.
        weight: [V_local, D], this rank's rows of the head, and `group`; or a DTensor [V, D] sharded on dim 0.
        bias: [V_local], or a DTensor [V] sharded like the weight, or None.
        group: whose ranks hold the head, in the order of the ranks; follows from a DTensor.
        temperature, logit_scale, logit_softcap, ignore_index, outputs, backend: as in `rlhf_kernels.linear_logprobs`.

    Returns:
        LinearLogprobs of the whole vocabulary, the same bits on every rank of the group. Gradients must come in the
        same on every rank; that of hidden goes out whole and summed, those of weight and bias are of this rank's rows.

    Raises: as `rlhf_kernels.linear_logprobs`, on every rank alike, and
        ValueError: ranks whose arguments do not fit together; neither a group nor a DTensor; a DTensor that is not
            sharded on dim 0 over a 1-D mesh.
        RuntimeError: backward with create_graph=True, with every backend.
    """
    whole = LMHead(weight, bias, logit_scale, logit_softcap)
    whole.check_options(temperature)
    head = local_head(whole, group)
    return sharded_logprobs(hidden, head, lambda: targets, temperature, ignore_index, outputs, backend)[0]


def sharded_logprobs(
    hidden: Tensor,
    head: LocalHead,
    make_targets: Callable[[], Tensor],
    temperature: float,
    ignore_index: int,
    outputs: Sequence[str],
    backend: str,
) -> tuple[LinearLogprobs, Tensor]:
    """-> results, and the targets: they are made where arguments are checked, as their inputs may be wrong too."""

    weight = head.head.weight

    def prepare() -> tuple[tuple[Side, Tensor, str], dict[str, Any]]:
        head.check(hidden)
        targets = make_targets()
        check_targets(targets, hidden)
        for name in outputs:
            check_choice("outputs", name, OPTIONAL_OUTPUTS)
        side = Side.of(hidden, head.head, temperature)
        chosen = resolve_backend(backend, hidden.device, side.gemm)
        return (side, targets, chosen), {
            "the number of rows": targets.numel(),
            "hidden's last dimension": hidden.shape[-1],
            "the number of targets that count": (targets != ignore_index).sum(),
            "the GEMM's dtype (its place in rlhf_kernels' list)": FLOATS.index(side.gemm),
            "whether there is a bias": int(head.head.bias is not None),
            "the backend (its place in rlhf_kernels' list)": BACKENDS.index(chosen),
            "outputs (a bit for each)": sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in outputs),
            "whether hidden requires a gradient": int(needs_gradient(hidden)),
            "temperature, scale, soft cap and ignore_index (a hash)": (side.transform, ignore_index),
            "targets (a fingerprint)": fingerprint(targets),
        }

    (side, targets, chosen), shards = agreed(prepare, head, hidden.device)
    flat = targets.reshape(-1)
    if not is_traced_or_captured(hidden):
        check_target_range(flat, shards.vocab_size, ignore_index)
    rows = CountedRows(flat != ignore_index)
    wanted = tuple(name for name in OPTIONAL_OUTPUTS if name in outputs)
    side = side._replace(hidden=rows.take(side.hidden))
    kept, (vocab, width) = 0, weight.shape
    frozen = chosen != "reference" and needs_gradient(side.hidden) and not needs_gradient(*side.tensors()[1:])
    if chosen == "native" and not frozen and needs_gradient(*side.tensors()) and vocab:
        kept = _workspace.logits_to_keep(side.hidden.shape[0], vocab, width, hidden.device)
    attributes = _Attributes(side.transform, side.gemm, shards, wanted, kept, frozen, chosen)
    results = _ShardedLogprobs.apply(*side.tensors(), rows.take(flat), rows.take_mask(), attributes)  # type: ignore[no-untyped-call]
    logprobs, logsumexp, *optional = (rows.put(r).view(targets.shape) for r in results)
    named = dict(zip(wanted, optional, strict=True))
    return LinearLogprobs(logprobs, logsumexp, *(named.get(name) for name in OPTIONAL_OUTPUTS)), targets


class _Attributes(NamedTuple):
    """The arguments of `_ShardedLogprobs` that are no tensors."""

    transform: LogitTransform
    gemm: torch.dtype
    shards: Shards
    wanted: tuple[str, ...]
    kept_logits: int
    frozen: bool  # directions d logprob / d hidden are made forward
    backend: str


class _ShardedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, targets, counted, attributes: _Attributes
    ) -> tuple[Tensor, ...]:
        transform, gemm, shards, wanted, kept_logits, frozen, backend = attributes
        side = Side.made_of(hidden, weight, bias, transform, gemm)
        # In a traced graph alone; outside it they have raised.
        wrong = counted & ((targets < 0) | (targets >= shards.vocab_size))
        owners = shards.owners(torch.where(counted & ~wrong, targets, 0))
        mine = (owners == shards.rank) & ~wrong
        local = torch.where(counted, torch.where(mine, targets - shards.start, 0), -1)
        statistics, kept = logprob_statistics(side, local, wanted, kept_logits, frozen, backend)
        merged = merge_logprobs(gather(torch.stack(statistics), shards.group), owners, shards, wanted)
        if frozen:
            kept = logprob_directions(
                side, local, mine, merged["shares"], shards.rank, statistics[0] + statistics[2], kept
            )
        merged.setdefault("entropy", hidden.new_empty(0))
        whole = (merged[name].to(statistics_dtype(backend)) for name in ("max_logit", "log_sum", "entropy"))
        ctx.save_for_backward(hidden, weight, bias, local, mine, *whole, kept)
        ctx.attributes = attributes
        merged["logprobs"] = torch.where(wrong, torch.nan, merged["logprobs"])
        merged["logsumexp"] = merged["max_logit"] + merged["log_sum"]
        names = ("logprobs", "logsumexp", *wanted)
        results = tuple(merged[name].to(logit_dtype(gemm)) for name in names)
        ctx.mark_non_differentiable(*(r for r, name in zip(results[2:], wanted, strict=True) if name != "entropy"))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable_once("linear_logprobs")
    def backward(ctx, grad_logprobs, grad_logsumexp, *rest):  # type: ignore[no-untyped-def]
        hidden, weight, bias, local, mine, *statistics = ctx.saved_tensors
        attributes: _Attributes = ctx.attributes
        whole = Statistics(*statistics)
        grad_entropy = rest[0] if "entropy" in attributes.wanted else None
        if attributes.frozen:
            if grad_logprobs is not None and grad_logsumexp is None and grad_entropy is None:
                part = Gradients(whole.logit_cache * grad_logprobs[:, None], None, None)
                return *summed(part, hidden.dtype, attributes.shards.group), None, None, None
            whole = whole._replace(logit_cache=whole.log_sum.new_empty(0))
        zero = torch.zeros_like(whole.log_sum)
        grad_logprobs = zero if grad_logprobs is None else grad_logprobs
        grad_logsumexp = zero if grad_logsumexp is None else grad_logsumexp
        upstream = Upstream(  # d logprob / dz is [v = y] - p: elsewhere only the second part
            torch.where(mine, grad_logprobs, 0),
            torch.where(mine, grad_logsumexp, grad_logsumexp - grad_logprobs),
            grad_entropy,
        )
        side = Side.made_of(hidden, weight, bias, attributes.transform, attributes.gemm)
        needs = Needs(*ctx.needs_input_grad[:3])
        gradients = logprob_gradients(side, local, upstream, whole, needs, attributes.backend)
        return *summed(gradients, hidden.dtype, attributes.shards.group), None, None, None


def summed(gradients: Gradients, dtype: torch.dtype, group: dist.ProcessGroup) -> Gradients:
    """The gradient of hidden over all shards, rounded once to its dtype; those of weight and bias as they are."""
    grad_hidden = gradients.hidden
    if grad_hidden is not None:
        grad_hidden = grad_hidden.contiguous()
        if grad_hidden.numel():
            dist.all_reduce(grad_hidden, group=group)
        grad_hidden = grad_hidden.to(dtype)
    return gradients._replace(hidden=grad_hidden)
