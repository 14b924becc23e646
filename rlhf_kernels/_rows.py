"""Row bookkeeping of the reference backends: which rows count, and chunks that keep logits inside the workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._workspace import workspace_budget_bytes


def map_counted_rows(
    per_row: Callable[..., tuple[Tensor, ...]],
    counted: Tensor,
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor | None, ...],
    vocab_size: int,
    dtype: torch.dtype,
    copies_of_logits: int = 4,
) -> tuple[Tensor, ...]:
    """Applies `per_row(*rows, *shared)` to the rows where `counted` [N] is true and returns zeros elsewhere.

    `rows` are tensors of N rows, `shared` are passed whole. Rows go through in chunks whose logits fit the workspace
    budget, and each chunk is recomputed in backward, so nothing `[N, vocab]` is ever held. Rows that do not count are
    never read: their output and gradient are exactly zero even where the inputs or the upstream hold NaN.

    `copies_of_logits`: tensors of a chunk's [rows, vocab] that live at the same time: by default the logits, their
    shifted copy, exponentials and a gradient.
    """
    if torch.compiler.is_compiling():  # a data-dependent number of rows would break the graph: mask instead
        rows = tuple(torch.where(counted.view(-1, *[1] * (r.dim() - 1)), r, torch.zeros_like(r)) for r in rows)
        outs = checkpoint(per_row, *rows, *shared, use_reentrant=False, preserve_rng_state=False)
        return tuple(torch.where(counted, out, torch.zeros_like(out)) for out in outs)

    index = counted.nonzero().squeeze(1)
    chunk = max(1, workspace_budget_bytes(counted.device) // (copies_of_logits * vocab_size * dtype.itemsize))
    parts = [
        checkpoint(per_row, *(r[part] for r in rows), *shared, use_reentrant=False, preserve_rng_state=False)
        for part in index.split(chunk)
    ]
    zeros = counted.new_zeros(counted.shape, dtype=dtype)
    return tuple(zeros.index_put((index,), torch.cat(outs)) for outs in zip(*parts, strict=True))


def is_traced_or_captured(tensor: Tensor) -> bool:
    """Whether nothing can be read back from the device now."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class VisitedRows(NamedTuple):
    """The rows that kernels go over: `rows` [n] int64, or None for all; `masked`: some of those do not count."""

    rows: Tensor | None
    masked: bool


def rows_to_visit(
    counted: Tensor, wrong: Tensor | None = None, refuse: Callable[[], None] | None = None
) -> VisitedRows:
    """The rows that count [N] bool. While a graph is traced or captured, nothing can be read back from the device, and
    all are gone over. Otherwise their number is read back, and in the same reading whether any row is `wrong`: then
    `refuse` is to raise."""
    if is_traced_or_captured(counted):
        return VisitedRows(None, True)
    tallies = [counted.sum()] if wrong is None else [counted.sum(), wrong.sum()]
    count, *bad = torch.stack(tallies).tolist()
    if any(bad) and refuse is not None:
        refuse()
    if count == counted.shape[0]:
        return VisitedRows(None, False)
    rows = counted.to(torch.uint8).argsort(descending=True, stable=True)[:count]  # as nonzero, which would read back
    return VisitedRows(rows, False)
