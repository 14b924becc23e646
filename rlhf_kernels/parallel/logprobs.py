"""Vocabulary-parallel `linear_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _workspace
from .._checks import FLOATS, check_choice, check_target_range, check_targets
from .._dispatch import BACKENDS, resolve_backend
from .._logits import LogitTransform, gemm_dtype, logit_dtype
from .._ops import needs_gradient
from .._rows import is_traced_or_captured
from ..logprob import LinearLogprobs
from ..logprob.reference import OPTIONAL_OUTPUTS
from .backends import Side, Upstream, differentiable_once, logprob_gradients, logprob_statistics, statistics_dtype
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
    transform = LogitTransform.checked(temperature, logit_scale, logit_softcap)
    head = local_head(weight, bias, group)
    return sharded_logprobs(hidden, head, lambda: targets, transform, ignore_index, outputs, backend)[0]


def sharded_logprobs(
    hidden: Tensor,
    head: LocalHead,
    make_targets: Callable[[], Tensor],
    transform: LogitTransform,
    ignore_index: int,
    outputs: Sequence[str],
    backend: str,
) -> tuple[LinearLogprobs, Tensor]:
    """Also returns the targets; what they are made of is checked together with the other arguments."""

    def prepare() -> tuple[tuple[Tensor, torch.dtype, str], dict[str, Any]]:
        head.check(hidden)
        targets = make_targets()
        check_targets(targets, hidden)
        for name in outputs:
            check_choice("outputs", name, OPTIONAL_OUTPUTS)
        gemm = gemm_dtype(hidden, head.weight)
        chosen = resolve_backend(backend, hidden.device, gemm)
        return (targets, gemm, chosen), {
            "the number of rows": targets.numel(),
            "hidden's last dimension": hidden.shape[-1],
            "the number of targets that count": (targets != ignore_index).sum(),
            "the GEMM's dtype (its place in rlhf_kernels' list)": FLOATS.index(gemm),
            "whether there is a bias": int(head.bias is not None),
            "the backend (its place in rlhf_kernels' list)": BACKENDS.index(chosen),
            "outputs (a bit for each)": sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in outputs),
            "whether hidden requires a gradient": int(needs_gradient(hidden)),
            "temperature, scale, soft cap and ignore_index (a hash)": (transform, ignore_index),
            "targets (a fingerprint)": fingerprint(targets),
        }

    (targets, gemm, chosen), shards = agreed(prepare, head, hidden.device)
    flat = targets.reshape(-1)
    if not is_traced_or_captured(hidden):
        check_target_range(flat, shards.vocab_size, ignore_index)
    rows = CountedRows(flat != ignore_index)
    wanted = tuple(name for name in OPTIONAL_OUTPUTS if name in outputs)
    side = Side(rows.take(hidden.reshape(-1, hidden.shape[-1])), head.weight, head.bias, transform, gemm)
    kept = 0
    if chosen == "native" and needs_gradient(hidden, head.weight, head.bias) and head.weight.shape[0]:
        vocab, width = head.weight.shape
        kept = _workspace.logits_to_keep(side.hidden.shape[0], vocab, width, hidden.device)
    results = _ShardedLogprobs.apply(
        *side[:3], rows.take(flat), rows.take_mask(), side[3:], shards, wanted, kept, chosen
    )  # type: ignore[no-untyped-call]
    logprobs, logsumexp, *optional = (rows.put(r).view(targets.shape) for r in results)
    named = dict(zip(wanted, optional, strict=True))
    return LinearLogprobs(logprobs, logsumexp, *(named.get(name) for name in OPTIONAL_OUTPUTS)), targets


class _ShardedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, targets, counted, logits, shards: Shards, wanted, kept_logits, backend
    ) -> tuple[Tensor, ...]:
        side = Side(hidden, weight, bias, *logits)
        # In a traced graph alone; outside it they have raised.
        wrong = counted & ((targets < 0) | (targets >= shards.vocab_size))
        owners = shards.owners(torch.where(counted & ~wrong, targets, 0))
        mine = (owners == shards.rank) & ~wrong
        local = torch.where(counted, torch.where(mine, targets - shards.start, 0), -1)
        statistics, kept = logprob_statistics(side, local, wanted, kept_logits, backend)
        merged = merge_logprobs(gather(torch.stack(statistics), shards.group), owners, shards, wanted)
        merged.setdefault("entropy", hidden.new_empty(0))
        whole = (merged[name].to(statistics_dtype(backend)) for name in ("max_logit", "log_sum", "entropy"))
        ctx.save_for_backward(hidden, weight, bias, local, mine, *whole, kept)
        ctx.logits, ctx.shards, ctx.wanted, ctx.backend = logits, shards, wanted, backend
        merged["logprobs"] = torch.where(wrong, torch.nan, merged["logprobs"])
        merged["logsumexp"] = merged["max_logit"] + merged["log_sum"]
        names = ("logprobs", "logsumexp", *wanted)
        results = tuple(merged[name].to(logit_dtype(side.gemm)) for name in names)
        ctx.mark_non_differentiable(*(r for r, name in zip(results[2:], wanted, strict=True) if name != "entropy"))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable_once("linear_logprobs")
    def backward(ctx, grad_logprobs, grad_logsumexp, *rest):  # type: ignore[no-untyped-def]
        hidden, weight, bias, local, mine, max_logit, log_sum, entropy, kept = ctx.saved_tensors
        zero = torch.zeros_like(log_sum)
        grad_logprobs = zero if grad_logprobs is None else grad_logprobs
        grad_logsumexp = zero if grad_logsumexp is None else grad_logsumexp
        upstream = Upstream(  # d logprob / dz is [v = y] - p: elsewhere only the second part
            torch.where(mine, grad_logprobs, 0),
            torch.where(mine, grad_logsumexp, grad_logsumexp - grad_logprobs),
            rest[0] if "entropy" in ctx.wanted else None,
        )
        side = Side(hidden, weight, bias, *ctx.logits)
        found = logprob_gradients(
            side, local, upstream, max_logit, log_sum, entropy, kept, ctx.needs_input_grad[:3], ctx.backend
        )
        return *summed(found, hidden.dtype, ctx.shards.group), *[None] * 7


def summed(
    found: tuple[Tensor | None, Tensor | None, Tensor | None], dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of hidden over all shards, rounded once to its dtype; those of weight and bias as they are."""
    grad_hidden, grad_weight, grad_bias = found
    if grad_hidden is not None:
        grad_hidden = grad_hidden.contiguous()
        if grad_hidden.numel():
            dist.all_reduce(grad_hidden, group=group)
        grad_hidden = grad_hidden.to(dtype)
    return grad_hidden, grad_weight, grad_bias
