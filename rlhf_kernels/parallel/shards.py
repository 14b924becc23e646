"""The ranks' rows of the vocabulary, and the check that the ranks' arguments fit together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .._checks import check_head
from .._logits import LMHead

Prepared = TypeVar("Prepared")


class Shards(NamedTuple):
    """Rank r of `group` holds `sizes[r]` rows of the vocabulary, in the order of the ranks; this is rank `rank`."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    def owners(self, targets: Tensor) -> Tensor:
        """The rank that holds the row of each target, which must be in range."""
        ends = torch.tensor(tuple(itertools.accumulate(self.sizes)), device=targets.device)
        return torch.bucketize(targets, ends, right=True)


class LocalHead(NamedTuple):
    """This rank's rows of the head. `sizes`: the numbers of rows of all ranks; None: they do not know them yet."""

    head: LMHead  # weight [V_local, D], bias [V_local]
    group: dist.ProcessGroup
    sizes: tuple[int, ...] | None

    def check(self, hidden: Tensor, prefix: str = "") -> None:
        """`check_head`, but that a shard may have no rows."""
        weight, bias, *_ = self.head
        if isinstance(hidden, DTensor):
            raise ValueError(
                f"{prefix}hidden must be a plain tensor, the same on every rank, got a DTensor: redistribute it to "
                "Replicate() and pass its to_local()"
            )
        if weight.dim() == 2 and weight.shape[0] == 0:
            if bias is not None and bias.shape == (0,):
                bias = bias.new_empty(1)
            weight = weight.new_empty(1, weight.shape[1])
        check_head(hidden, weight, bias, prefix=prefix)


def local_head(head: LMHead, group: dist.ProcessGroup | None, *, prefix: str = "") -> LocalHead:
    """This rank's part of a head that came as its own rows and a group, or as a DTensor."""
    weight, bias, *_ = head
    if not isinstance(weight, DTensor):
        if group is None:
            raise ValueError(
                f"{prefix}weight is a plain tensor: pass the group whose ranks hold the head's rows "
                "(torch.distributed.group.WORLD is all), or a DTensor sharded on dim 0"
            )
        if isinstance(bias, DTensor):
            raise ValueError(f"{prefix}bias is a DTensor and {prefix}weight is not: pass bias.to_local()")
        return LocalHead(head, group, None)
    mesh = weight.device_mesh
    _check_placement(f"{prefix}weight", weight)
    if group is not None and group != mesh.get_group():
        raise ValueError(f"{prefix}weight is a DTensor: leave group out, or pass its mesh's own group")
    if isinstance(bias, DTensor):
        _check_placement(f"{prefix}bias", bias)
        if bias.device_mesh != mesh:
            raise ValueError(f"{prefix}bias and {prefix}weight must be sharded over one mesh")
        bias = bias.to_local()
    # A group is in the order of its ranks, whatever the mesh's is. A traced graph cannot look.
    if not torch.compiler.is_compiling() and dist.get_process_group_ranks(mesh.get_group()) != mesh.mesh.tolist():
        raise ValueError(f"{prefix}weight's mesh must list its ranks in rising order, got {mesh.mesh.tolist()}")
    ranks, vocab = mesh.size(), weight.shape[0]
    chunk = -(-vocab // ranks)
    sizes = tuple(max(0, min(chunk, vocab - rank * chunk)) for rank in range(ranks))
    local = weight.to_local()
    if local.shape[0] != sizes[mesh.get_local_rank()]:
        raise ValueError(
            f"{prefix}weight has {local.shape[0]} rows on rank {mesh.get_local_rank()}, and an even sharding of "
            f"{vocab} has {sizes[mesh.get_local_rank()]}: pass weight.to_local() and the group instead"
        )
    return LocalHead(head._replace(weight=local, bias=bias), mesh.get_group(), sizes)


def _check_placement(name: str, tensor: DTensor) -> None:
    if tensor.device_mesh.ndim != 1 or type(tensor.placements[0]) is not Shard or tensor.placements[0].dim != 0:
        raise ValueError(
            f"{name} must be a DTensor sharded on dim 0 over a 1-D mesh, got {tensor.placements} over "
            f"{tuple(tensor.device_mesh.shape)}"
        )


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of each rank -> [ranks, ...]. What is made of it in one order on every rank has the same bits there."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    if x.numel():
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out


def agreed(
    prepare: Callable[[], tuple[Prepared, dict[str, Any]]], head: LocalHead, device: torch.device
) -> tuple[Prepared, Shards]:
    """`prepare()` checks this rank's arguments and returns (what is made of them, facts that all ranks must share:
    integers, or tuples, which are compared by their hashes)."""
    rank, weight = dist.get_rank(head.group), head.head.weight
    if head.sizes is not None:
        return prepare()[0], Shards(head.group, rank, head.sizes)
    prepared, own = exchanged(prepare, head.group, device, weight.shape[0] if weight.dim() else 0)
    shards = Shards(head.group, rank, tuple(own))
    if shards.vocab_size == 0:
        raise ValueError("the head has no rows: weight is [0, D] on every rank of the group")
    return prepared, shards


@torch.compiler.disable
def exchanged(
    prepare: Callable[[], tuple[Prepared, dict[str, Any]]], group: dist.ProcessGroup, device: torch.device, own: int
) -> tuple[Prepared, list[int]]:
    """One all-gather of integers: each rank's `own`, its facts, and whether `prepare` failed. Then an error on every
    rank, or (what was prepared, every rank's `own`)."""
    refusal: Exception | None = None
    names: tuple[str, ...] = ()
    values: list[Any] = []
    try:
        prepared, facts = prepare()
        names, values = tuple(facts), list(facts.values())
    except Exception as error:  # whatever it is: the other ranks wait
        refusal = error
    header = torch.zeros(2 + _MOST_FACTS, dtype=torch.int64, device=device)
    header[0], header[1] = own, int(refusal is not None)
    for i, value in enumerate(values):
        header[2 + i] = hash(value) if isinstance(value, tuple) else value  # a tensor is not read here
    rows = gather(header, group).tolist()
    if refusal is not None:
        raise refusal
    refusing = [rank for rank, row in enumerate(rows) if row[1]]
    if refusing:
        raise ValueError(f"rank {refusing[0]} of the group failed: its own error says why")
    for i, name in enumerate(names):
        values_of_ranks = [row[2 + i] for row in rows]
        if len(set(values_of_ranks)) > 1:
            raise ValueError(
                f"{name} must be the same on every rank of the group, got {values_of_ranks} in the ranks' order"
            )
    return prepared, [row[0] for row in rows]


_MOST_FACTS = 12


def fingerprint(x: Tensor) -> Tensor:
    """A number made of integers or bools that in all likelihood differs where replicated tensors are not replicas. Each
    element is mixed with its place, and not linearly: sums of products collide for [5, 7, 2] and [7, 6, 2]."""
    x = x.reshape(-1).to(torch.int64)
    mixed = x * _ODD[0] + torch.arange(x.numel(), device=x.device) * _ODD[1]
    for factor in _ODD[2:]:
        mixed = (mixed ^ (mixed >> 31)) * factor
    return (mixed ^ (mixed >> 31)).sum()


_ODD = (
    0x6A09E667F3BCC909,
    0x3C6EF372FE94F82B,
    0x510E527FADE682D1,
    0x1F83D9ABFB41BD6B,
)  # no pattern; odd ones lose nothing
