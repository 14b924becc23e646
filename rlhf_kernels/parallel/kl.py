"""Vocabulary-parallel `linear_kl`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import _workspace
from .._checks import FLOATS, check_choice
from .._dispatch import BACKENDS, resolve_backend
from .._logits import gemm_dtype, logit_dtype
from .._ops import needs_gradient
from ..kl import _both_transforms, _check_sides
from ..kl.ops import DIRECTIONS
from .backends import Side, differentiable_once, kl_gradients, kl_statistics, statistics_dtype
from .logprobs import summed
from .merge import merge_kl
from .rows import CountedRows
from .shards import Shards, agreed, fingerprint, gather, local_head


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "policy_ref",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""`rlhf_kernels.linear_kl` over two heads whose rows are split over the ranks of a group, alike.

    Args:
        hidden: [..., D], ref_hidden: [..., D'], mask: [...] bool or None, replicated.
        weight: [V_local, D], ref_weight: [V_local, D'], this rank's rows of both heads, and `group`; or DTensors
            [V, D], [V, D'] sharded on dim 0. Each rank holds the same rows of both.
        bias, ref_bias: [V_local], or DTensors [V], or None.
        group: whose ranks hold the heads, in the order of the ranks; follows from DTensors.
        the rest: as in `rlhf_kernels.linear_kl`.

    Returns:
        [...] in nats, >= 0, of the whole vocabulary, the same bits on every rank; as exact near the reference as
        `rlhf_kernels.linear_kl`. Gradients as in `linear_logprobs`.

    Raises: as `rlhf_kernels.linear_kl`, and as `linear_logprobs` of this module.
    """
    transform, ref_transform = _both_transforms(
        temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
    )
    check_choice("direction", direction, DIRECTIONS)
    head = local_head(weight, bias, group)
    ref_group = group if isinstance(ref_weight, DTensor) else head.group
    ref_head = local_head(ref_weight, ref_bias, ref_group, prefix="ref_")
    if ref_head.group != head.group:
        raise ValueError("weight and ref_weight must be split over the same group")
    shape = hidden.shape[:-1]

    def prepare() -> tuple[tuple[torch.dtype, torch.dtype, str], dict[str, Any]]:
        head.check(hidden)
        ref_head.check(ref_hidden, "ref_")
        _check_sides(hidden, head.weight, ref_hidden, ref_head.weight, mask, "a vocabulary and its shards, and here")
        gemm, ref_gemm = gemm_dtype(hidden, head.weight), gemm_dtype(ref_hidden, ref_head.weight)
        chosen = resolve_backend(backend, hidden.device, torch.promote_types(gemm, ref_gemm))
        return (gemm, ref_gemm, chosen), {
            "the number of rows": hidden.shape[:-1].numel(),
            "hidden's last dimension": hidden.shape[-1],
            "ref_hidden's last dimension": ref_hidden.shape[-1],
            "the number of rows that mask counts": shape.numel() if mask is None else mask.sum(),
            "the GEMMs' dtypes (their places in rlhf_kernels' list, 256 times the reference's)": (
                FLOATS.index(gemm) + 256 * FLOATS.index(ref_gemm)
            ),
            "which biases there are (1 bias, 2 ref_bias)": ((head.bias is not None) + 2 * (ref_head.bias is not None)),
            "the backend (its place in rlhf_kernels' list)": BACKENDS.index(chosen),
            "whether hidden requires a gradient": int(needs_gradient(hidden)),
            "direction": DIRECTIONS.index(direction),
            "temperature, scales and soft caps (a hash)": (transform, ref_transform),
            "mask (a fingerprint)": -1 if mask is None else fingerprint(mask),
        }

    (gemm, ref_gemm, chosen), shards = agreed(prepare, head, hidden.device)
    counted = torch.ones(shape, dtype=torch.bool, device=hidden.device) if mask is None else mask
    rows = CountedRows(counted.reshape(-1))
    policy = (rows.take(hidden.reshape(-1, hidden.shape[-1])), head.weight, head.bias, transform, gemm)
    ref_rows = rows.take(ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]))
    ref_bias = None if ref_head.bias is None else ref_head.bias.detach()
    ref = Side(ref_rows, ref_head.weight.detach(), ref_bias, ref_transform, ref_gemm)
    kept = 0
    if chosen == "native" and needs_gradient(*policy[:3]) and head.weight.shape[0]:
        vocab, width = head.weight.shape
        ref_width = ref_head.weight.shape[1]
        kept = _workspace.logits_to_keep(policy[0].shape[0], vocab, width, hidden.device, ref_width)
    kl = _ShardedKL.apply(
        *policy[:3], *ref[:3], rows.take_mask(), policy[3:], ref[3:], shards, direction == "policy_ref", kept, chosen
    )  # type: ignore[no-untyped-call]
    return rows.put(kl).view(shape)


class _ShardedKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, logits, ref_logits, shards: Shards,
        policy_ref, kept_logits, backend,
    ) -> Tensor:  # fmt: skip
        policy, ref = Side(hidden, weight, bias, *logits), Side(ref_hidden, ref_weight, ref_bias, *ref_logits)
        statistics, kept = kl_statistics(policy, ref, mask, policy_ref, kept_logits, backend)
        kl, stats = merge_kl(gather(torch.stack(statistics), shards.group), shards.rank)
        whole = (x.to(statistics_dtype(backend)) for x in (kl, stats))
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, *whole, kept)
        ctx.logits, ctx.ref_logits, ctx.shards = logits, ref_logits, shards
        ctx.policy_ref, ctx.backend = policy_ref, backend
        return kl.to(logit_dtype(torch.promote_types(policy.gemm, ref.gemm)))

    @staticmethod
    @differentiable_once("linear_kl")
    def backward(ctx, grad_kl):  # type: ignore[no-untyped-def]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, kl, stats, kept = ctx.saved_tensors
        policy = Side(hidden, weight, bias, *ctx.logits)
        ref = Side(ref_hidden, ref_weight, ref_bias, *ctx.ref_logits)
        found = kl_gradients(
            grad_kl, kl, stats, kept, policy, ref, mask, ctx.policy_ref, ctx.needs_input_grad[:3], ctx.backend
        )
        return *summed(found, hidden.dtype, ctx.shards.group), *[None] * 10
