"""Sizes of the Triton backend: what follows from the vocabulary alone, and what fits the budget."""

import pytest
import torch

from rlhf_kernels._triton import plan

MIB = 1 << 20


@pytest.mark.parametrize("vocab", [1, 127, 128, 2048, 2049, 32003, 128256, 256000, 1 << 20])
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_splits_cover_the_vocabulary_once(vocab, columns):
    splits = plan.splits_of(vocab, columns)
    assert splits.parts * splits.tiles * columns >= vocab > (splits.parts - 1) * splits.tiles * columns
    assert splits.parts <= plan.MOST_SPLITS and splits.tiles >= plan.LEAST_TILES


@pytest.mark.parametrize("rows", [0, 1, 100, 8192, 65536, 1 << 20])
@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize("copies, casts", [(False, False), (True, False), (True, True)])
def test_the_backward_plan_fits_the_budget(rows, width, copies, casts):
    budget, gemm = 256 * MIB, torch.bfloat16
    group, at_once = plan.plan_backward(rows, width, gemm, copies, casts, 0, budget)
    held = rows if at_once is None else at_once
    used = held * (group + (width if copies else 0)) * gemm.itemsize + (group * width * gemm.itemsize if casts else 0)
    sums = 0 if at_once is None else 2 * 4 * group * width
    assert used + sums <= budget
    assert at_once is None or at_once < rows


@pytest.mark.parametrize("rows", [1, 127, 8192, 1 << 20])
@pytest.mark.parametrize("bytes_a_row", [504, 8192 + 504])
def test_the_forward_plan_fits_the_budget(rows, bytes_a_row):
    at_once = plan.plan_forward(rows, bytes_a_row, 64 * MIB)
    assert (at_once or rows) * bytes_a_row <= 64 * MIB
    assert at_once is None or (at_once < rows and at_once % plan.ROW_STEP == 0)
    assert plan.plan_forward(rows, 64 * MIB, 64 * MIB) in (None, plan.ROW_STEP)  # one block at least


def test_a_larger_budget_never_takes_smaller_groups():
    groups = [plan.plan_backward(8192, 4096, torch.bfloat16, True, False, 0, mib * MIB).group for mib in (8, 64, 256)]
    assert groups == sorted(groups)
