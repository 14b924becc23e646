"""Vocabulary-parallel `linear_kl`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import _workspace
from .._checks import FLOATS, check_choice
from .._dispatch import BACKENDS, resolve_backend
from .._logits import LMHead, LogitTransform, Needs, Side, logit_dtype
from .._ops import needs_gradient
from ..kl import check_sides, ref_head_of
from ..kl.autograd import Statistics
from ..kl.reference import DIRECTIONS
from .backends import differentiable_once, kl_gradients, kl_statistics, statistics_dtype
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
    whole = LMHead(weight, bias, logit_scale, logit_softcap)
    ref_whole = ref_head_of(whole, ref_weight, ref_bias, ref_logit_scale, ref_logit_softcap)
    whole.check_options(temperature)
    ref_whole.check_options(temperature)
    check_choice("direction", direction, DIRECTIONS)
    head = local_head(whole, group)
    ref_head = local_head(ref_whole, group if isinstance(ref_weight, DTensor) else head.group, prefix="ref_")
    if ref_head.group != head.group:
        raise ValueError("weight and ref_weight must be split over the same group")
    shape = hidden.shape[:-1]

    def prepare() -> tuple[tuple[Side, Side, str], dict[str, Any]]:
        head.check(hidden)
        ref_head.check(ref_hidden, "ref_")
        shared = "a vocabulary and its shards, and here"
        check_sides(hidden, head.head.weight, ref_hidden, ref_head.head.weight, mask, shared)
        policy = Side.of(hidden, head.head, temperature)
        ref = Side.of(ref_hidden, ref_head.head, temperature).detach()
        chosen = resolve_backend(backend, hidden.device, torch.promote_types(policy.gemm, ref.gemm))
        return (policy, ref, chosen), {
            "the number of rows": hidden.shape[:-1].numel(),
            "hidden's last dimension": hidden.shape[-1],
            "ref_hidden's last dimension": ref_hidden.shape[-1],
            "the number of rows that mask counts": shape.numel() if mask is None else mask.sum(),
            "the GEMMs' dtypes (their places in rlhf_kernels' list, 256 times the reference's)": (
                FLOATS.index(policy.gemm) + 256 * FLOATS.index(ref.gemm)
            ),
            "which biases there are (1 bias, 2 ref_bias)": (
                (policy.head.bias is not None) + 2 * (ref.head.bias is not None)
            ),
            "the backend (its place in rlhf_kernels' list)": BACKENDS.index(chosen),
            "whether hidden requires a gradient": int(needs_gradient(hidden)),
            "direction": DIRECTIONS.index(direction),
            "temperature, scales and soft caps (a hash)": (policy.transform, ref.transform),
            "mask (a fingerprint)": -1 if mask is None else fingerprint(mask),
        }

    (policy, ref, chosen), shards = agreed(prepare, head, hidden.device)
    counted = torch.ones(shape, dtype=torch.bool, device=hidden.device) if mask is None else mask
    rows = CountedRows(counted.reshape(-1))
    policy, ref = policy._replace(hidden=rows.take(policy.hidden)), ref._replace(hidden=rows.take(ref.hidden))
    kept, (vocab, width) = 0, policy.head.weight.shape
    if chosen == "native" and needs_gradient(*policy.tensors()) and vocab:
        ref_width = ref.head.weight.shape[1]
        kept = _workspace.logits_to_keep(policy.hidden.shape[0], vocab, width, hidden.device, ref_width)
    attributes = _Attributes(
        policy.transform, policy.gemm, ref.transform, ref.gemm, shards, direction == "policy_ref", kept, chosen
    )
    kl = _ShardedKL.apply(*policy.tensors(), *ref.tensors(), rows.take_mask(), attributes)  # type: ignore[no-untyped-call]
    return rows.put(kl).view(shape)


class _Attributes(NamedTuple):
    """The arguments of `_ShardedKL` that are no tensors."""

    transform: LogitTransform
    gemm: torch.dtype
    ref_transform: LogitTransform
    ref_gemm: torch.dtype
    shards: Shards
    policy_ref: bool
    kept_logits: int
    backend: str


class _ShardedKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, attributes: _Attributes
    ) -> Tensor:
        a = attributes
        policy = Side.made_of(hidden, weight, bias, a.transform, a.gemm)
        ref = Side.made_of(ref_hidden, ref_weight, ref_bias, a.ref_transform, a.ref_gemm)
        statistics, kept = kl_statistics(policy, ref, mask, a.policy_ref, a.kept_logits, a.backend)
        kl, stats = merge_kl(gather(torch.stack(statistics), a.shards.group), a.shards.rank)
        whole = (x.to(statistics_dtype(a.backend)) for x in (kl, stats))
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, *whole, kept)
        ctx.attributes = attributes
        return kl.to(logit_dtype(torch.promote_types(a.gemm, a.ref_gemm)))

    @staticmethod
    @differentiable_once("linear_kl")
    def backward(ctx, grad_kl):  # type: ignore[no-untyped-def]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, *statistics = ctx.saved_tensors
        a: _Attributes = ctx.attributes
        policy = Side.made_of(hidden, weight, bias, a.transform, a.gemm)
        ref = Side.made_of(ref_hidden, ref_weight, ref_bias, a.ref_transform, a.ref_gemm)
        needs = Needs(*ctx.needs_input_grad[:3])
        gradients = kl_gradients(grad_kl, Statistics(*statistics), policy, ref, mask, a.policy_ref, needs, a.backend)
        return *summed(gradients, hidden.dtype, a.shards.group), *[None] * 5
