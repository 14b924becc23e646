"""Rows that do not count are left out before anything is communicated or multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import rows_to_visit


class CountedRows:
    """Those of N rows where `counted` [N] is true: all of them, with a mask, while a graph is traced or captured."""

    def __init__(self, counted: Tensor) -> None:
        self.counted = counted
        self.index, self.masked = rows_to_visit(counted)

    def take(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [n, ...]: neither value nor gradient of the others is read."""
        if self.index is not None:
            return rows[self.index]
        return torch.where(self.counted.view(-1, *[1] * (rows.dim() - 1)), rows, 0) if self.masked else rows

    def take_mask(self) -> Tensor:
        return self.counted if self.index is None else self.counted[self.index]

    def put(self, values: Tensor) -> Tensor:
        """[n] -> [N], 0 elsewhere."""
        if self.index is not None:
            return values.new_zeros(self.counted.shape).index_put((self.index,), values)
        return torch.where(self.counted, values, 0) if self.masked else values
