"""Sizes of tiles, programs and scratch: plain arithmetic, no triton, no tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

LEAST_TILES, MOST_SPLITS = 8, 64
GROUPS = (8192, 4096, 2048, 1024, 512, 256)  # vocabulary rows whose dlogits are held at a time
ROW_STEP = 128
VECTOR = 256  # elements of a program over small vectors


def cdiv(a, b):  # type: ignore[no-untyped-def]  # also of a traced number of rows
    return (a + b - 1) // b


class Splits(NamedTuple):
    """`parts` of the vocabulary, of `tiles` tiles each, whose statistics one program folds."""

    parts: int
    tiles: int


def splits_of(vocab: int, columns: int) -> Splits:
    """Follows from the vocabulary alone, so that a row's bits do not depend on its batch. Enough programs for a small
    batch, and few enough partial statistics for a large one."""
    tiles = max(LEAST_TILES, cdiv(vocab, columns * MOST_SPLITS))
    return Splits(cdiv(vocab, columns * tiles), tiles)


def plan_forward(rows: int, bytes_a_row: int, budget: int) -> int | None:
    """How many rows fit `budget` bytes, a multiple of ROW_STEP; None where all do."""
    return None if rows * bytes_a_row <= budget else max(ROW_STEP, budget // bytes_a_row // ROW_STEP * ROW_STEP)


def parts_at_once(rows: int, parts: int, bytes_a_row: int, a_row_of_a_part: int, of_a_part: int, budget: int) -> int:
    """How many of the vocabulary's `parts` fit `budget` bytes at a time with all rows, or 1: all, half of them, ..."""
    while parts > 1 and rows * (bytes_a_row + parts * a_row_of_a_part) + parts * of_a_part > budget:
        parts = cdiv(parts, 2)
    return parts


class BackwardPlan(NamedTuple):
    group: int
    rows_at_once: int | None  # None: all; otherwise dW is summed over chunks of rows in fp32


def plan_backward(
    rows: int, width: int, gemm: torch.dtype, copies_hidden: bool, casts_head: bool, beside: int, budget: int
) -> BackwardPlan:
    """The largest group of dlogits [rows, group] that fits `budget` bytes, with what is copied for the GEMMs and with
    `beside` bytes a row.

    Only comparisons on `rows`, so that a traced number of rows is bounded and not fixed.
    """
    copied = beside + (width * gemm.itemsize if copies_hidden else 0)

    def fixed(group: int) -> int:
        return group * width * gemm.itemsize if casts_head else 0

    for group in GROUPS:
        if rows * (group * gemm.itemsize + copied) + fixed(group) <= budget:
            return BackwardPlan(group, None)
    group = GROUPS[-1]
    left = budget - fixed(group) - 2 * 4 * group * width  # the sums, and a product before it is added
    affordable = left // (group * gemm.itemsize + copied)
    return BackwardPlan(group, max(ROW_STEP, affordable // ROW_STEP * ROW_STEP))
