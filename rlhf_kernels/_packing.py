"""Packed rows: several sequences one after another, as padding-free training lays them out, and sums over each.

Boundaries [S + 1] int64 say where: sequence s is the tokens boundaries[s] to boundaries[s + 1] - 1 of the flat [N].
The first is 0, the last N; where neighbours are equal the sequence is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_same_device, check_targets
from ._rows import is_traced_or_captured, rows_to_visit

INDEX_DTYPES = (torch.int32, torch.int64)


class Packing(NamedTuple):
    """`boundaries` [S + 1] int64. `sound` [] bool says whether they are the caller's; None: they are. Where they could
    not be read back and are wrong, the first sequence has all tokens instead, and every sum is to be NaN."""

    boundaries: Tensor
    sound: Tensor | None

    @property
    def size(self) -> int:
        return self.boundaries.shape[0] - 1


def packing_of(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None, padded: str
) -> Packing | None:
    """Checks the shapes of hidden and labels; `padded` names hidden's where nothing is packed, and None is returned.

    From cu_seqlens on a GPU nothing is read back. How many sequences position_ids hold takes one reading, which says as
    well whether they are right.
    """
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError("cu_seqlens and position_ids say the same: pass one of them, got both")
    if cu_seqlens is not None:
        if hidden.dim() != 2 and (hidden.dim() != 3 or hidden.shape[0] != 1):
            raise ValueError(f"with cu_seqlens hidden must be [1, N, D] or [N, D], got {tuple(hidden.shape)}")
        check_targets(labels, hidden, "labels")
        return _from_cu_seqlens(cu_seqlens, labels)
    if position_ids is not None:
        if hidden.dim() not in (2, 3):
            raise ValueError(f"with position_ids hidden must be [B, T, D] or [N, D], got {tuple(hidden.shape)}")
        check_targets(labels, hidden, "labels")
        return _from_position_ids(position_ids, labels)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be {padded}, got {tuple(hidden.shape)}")
    check_targets(labels, hidden, "labels")
    return None


def _from_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> Packing:
    _check_index_dtype("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [S + 1], got {tuple(cu_seqlens.shape)}")
    check_same_device(labels=labels, cu_seqlens=cu_seqlens)
    tokens, boundaries = labels.numel(), cu_seqlens.long()
    sound = (boundaries[0] == 0) & (boundaries[-1] == tokens) & (boundaries.diff() >= 0).all()
    if cu_seqlens.is_cuda or is_traced_or_captured(cu_seqlens):
        all_first = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device).clamp(max=1) * tokens
        return Packing(torch.where(sound, boundaries, all_first), sound)
    if not bool(sound):
        _refuse_cu_seqlens(boundaries.tolist(), tokens)
    return Packing(boundaries, None)


def _refuse_cu_seqlens(values: list[int], tokens: int) -> None:
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the number of tokens, {tokens}; got {values[0]} and {values[-1]}"
        )
    at = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
    raise ValueError(f"cu_seqlens must not decrease, got {values[at]} after {values[at - 1]} at index {at}")


def _from_position_ids(position_ids: Tensor, labels: Tensor) -> Packing:
    _check_index_dtype("position_ids", position_ids)
    if position_ids.shape != labels.shape:
        raise ValueError(f"position_ids must be {tuple(labels.shape)} like labels, got {tuple(position_ids.shape)}")
    check_same_device(labels=labels, position_ids=position_ids)
    if is_traced_or_captured(position_ids):
        raise ValueError(
            "how many sequences position_ids hold must be read back, which cannot be done while a graph is traced or "
            "captured: pass cu_seqlens"
        )
    due = torch.nn.functional.pad(position_ids, (1, 0), value=-1)[..., :-1] + 1
    starts = (position_ids == 0).flatten()
    wrong = ((position_ids != 0) & (position_ids != due)).flatten()

    def refuse() -> None:
        at = int(wrong.nonzero()[0])
        position, expected = int(position_ids.flatten()[at]), int(due.flatten()[at])
        raise ValueError(
            "position_ids must be 0 at the first token of each row and then go on by 1 or restart at 0; "
            f"got {position} instead of {expected} at token {at} of {wrong.numel()}"
        )

    firsts = rows_to_visit(starts, wrong, refuse).rows
    if firsts is None:  # every token starts a sequence
        firsts = torch.arange(starts.shape[0], device=starts.device)
    return Packing(torch.nn.functional.pad(firsts, (0, 1), value=starts.shape[0]), None)


def _check_index_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def sums_of_sequences(values: Tensor, packing: Packing | None = None) -> Tensor:
    """values [B, T] -> [B] sums of rows, or with packing [S] sums of its sequences; fp64, and autograd knows the way.

    In fp64 the order of a sum's terms hardly ever changes its fp32 rounding, so both forms have the same bits. Each
    sequence is added up by itself: no other's NaN reaches it, and no atomics leave the order to chance.
    """
    if packing is None:
        return values.sum(-1, dtype=_sum_dtype(values))
    sums = _segment_sums(values, packing)
    return sums if packing.sound is None else sums * torch.where(packing.sound, 1.0, torch.nan)


def counts_of_sequences(counted: Tensor, packing: Packing | None = None) -> Tensor:
    """counted [B, T] bool -> int64 [B], how many of each row count, or with packing [S], of each of its sequences."""
    return counted.sum(-1) if packing is None else _segment_sums(counted, packing).long()


def _segment_sums(values: Tensor, packing: Packing) -> Tensor:
    # "unsafe" leaves out torch's own look at the offsets, which would read them back.
    flat = values.flatten().to(_sum_dtype(values))
    return torch.segment_reduce(flat, "sum", offsets=packing.boundaries, unsafe=True)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
