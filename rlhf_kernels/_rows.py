"""Row bookkeeping of the reference backends: which rows count, and chunks that keep logits inside the workspace."""

from __future__ import annotations

from collections.abc import Callable

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


def rows_to_visit(counted: Tensor) -> tuple[Tensor | None, bool]:
    """(index, masked) for kernels that go over rows: the rows that count, [n] int64, or None where all are gone over;
    and whether some of those do not count. Reads the number of rows that count back from the device, but not while a
    graph is traced or captured: then all are gone over."""
    if is_traced_or_captured(counted):
        return None, True
    index = counted.nonzero().squeeze(1)
    return (None, False) if index.shape[0] == counted.shape[0] else (index, False)
