"""linear_logprobs in Triton: logits stay in registers; only statistics, and dlogits of a slice, are written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logits import Needs, Side
from .._rows import VisitedRows
from .._triton import INTERPRETED, plan
from .._triton.gradient import head_gradient
from .._triton.launch import (
    LIGHT,
    MEDIUM,
    TL_DTYPE,
    Tile,
    contiguous,
    launch,
    readable,
    readable_side,
    tile_for,
    transform_arguments,
    tuned,
    uses_tma,
)
from .._triton.maths import (
    LOWEST_LOG_P,
    empty_softmax,
    expm1,
    final_logits,
    finite_max,
    logit_slope,
    merge_softmax,
    rescale_softmax,
)
from .._triton.tiles import described, in_groups, multiply, visited_rows
from .autograd import Statistics, Upstream

FIELDS = 5  # of a split's statistics: max, sum, shifted, squares, logit sum


@triton.jit
def _store(partials, field, split, splits, rows, row, inside, value):
    tl.store(partials + tl.cast(field * splits + split, tl.int64) * rows + row, value, mask=inside)


@tuned
@triton.jit(do_not_specialize=["rows", "hidden_rows"])
def fold(
    hidden, index, hidden_stride, hidden_step, head, head_stride, head_step, bias, targets, partials, best,
    target_logit, rows, hidden_rows, vocab, width, splits, gain, cap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr,
    DTYPE: tl.constexpr, KIND: tl.constexpr, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, INTERPRETED: tl.constexpr,
    TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One row block over one split of the vocabulary, TILES tiles: its softmax statistics, and the target's logit."""
    row_block, split = in_groups(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row, inside, at = visited_rows(index, 0, row_block, rows, ROWS)
    target = tl.load(targets + at, mask=inside, other=-1)
    counts = inside & (target >= 0)
    hidden_source = described(hidden, hidden_rows, width, hidden_stride, ROWS, DEPTH, TMA)
    head_source = described(head, vocab, width, head_stride, COLUMNS, DEPTH, TMA)

    own = tl.where(counts & (target < vocab), target, -1).to(tl.int32)  # a tile of 64-bit comparisons would spill
    m, s, shifted, squares = empty_softmax(ROWS)
    logit_sum = tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    for tile in range(TILES):
        first = (split * TILES + tile) * COLUMNS
        if first < vocab:
            x = multiply(
                hidden_source, row_block * ROWS, at, counts, hidden_stride, hidden_step, head_source, first, vocab,
                head_stride, head_step, width, ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
            )  # fmt: skip
            columns = first + tl.arange(0, COLUMNS)
            z = final_logits(x, bias, columns, vocab, gain, cap, KIND)
            tile_max = tl.max(z, 1)
            if EXTRAS:
                argmax = tl.where(tile_max > m, first + tl.argmax(z, 1), argmax)
                logit_sum += tl.sum(tl.where((columns < vocab)[None, :], z, 0.0), 1)
            new_max = tl.maximum(m, tile_max)
            s, shifted, squares = rescale_softmax(m, s, shifted, squares, new_max)
            m = new_max
            delta = z - finite_max(m)[:, None]
            e = tl.exp(delta)
            s += tl.sum(e, 1)
            if ENTROPY:
                shifted += tl.sum(e * tl.maximum(delta, LOWEST_LOG_P), 1)
            if EXTRAS:
                squares += tl.sum(e * e, 1)
            here = (own >= first) & (own < first + COLUMNS)
            logit = tl.sum(tl.where(columns[None, :] == own[:, None], z, 0.0), 1)
            tl.store(target_logit + row, logit, mask=here)

    _store(partials, 0, split, splits, rows, row, inside, m)
    _store(partials, 1, split, splits, rows, row, inside, s)
    if ENTROPY:
        _store(partials, 2, split, splits, rows, row, inside, shifted)
    if EXTRAS:
        _store(partials, 3, split, splits, rows, row, inside, squares)
        _store(partials, 4, split, splits, rows, row, inside, logit_sum)
        _store(best, 0, split, splits, rows, row, inside, argmax)


@triton.jit(do_not_specialize=["rows"])
def merge(
    partials, best, target_logit, targets, index, rows, vocab, splits,
    logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs,
    ROWS: tl.constexpr, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Merges the splits in their order, and writes the results at the row's place. Rows that do not count: 0."""
    row, inside, at = visited_rows(index, 0, tl.program_id(0), rows, ROWS)
    target = tl.load(targets + at, mask=inside, other=-1)
    counts = inside & (target >= 0)
    m, s, shifted, squares = empty_softmax(ROWS)
    logit_sum = tl.zeros([ROWS], tl.float64)
    argmax = tl.zeros([ROWS], tl.int32)
    zero = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        field = partials + tl.cast(split, tl.int64) * rows + row
        step = tl.cast(splits, tl.int64) * rows
        part_max = tl.load(field, mask=inside, other=0.0)
        part_sum = tl.load(field + step, mask=inside, other=0.0)
        part_shifted = zero
        part_squares = zero
        if ENTROPY:
            part_shifted = tl.load(field + 2 * step, mask=inside, other=0.0)
        if EXTRAS:
            part_squares = tl.load(field + 3 * step, mask=inside, other=0.0)
            logit_sum += tl.load(field + 4 * step, mask=inside, other=0.0).to(tl.float64)
            part_argmax = tl.load(best + tl.cast(split, tl.int64) * rows + row, mask=inside, other=0)
            argmax = tl.where(part_max > m, part_argmax, argmax)
        m, s, shifted, squares = merge_softmax(m, s, shifted, squares, part_max, part_sum, part_shifted, part_squares)
    log_total = tl.log(s)
    z = tl.load(target_logit + row, mask=counts, other=0.0)
    tl.store(logprobs + at, tl.where(counts, (z - finite_max(m)) - log_total, 0.0), mask=inside)
    tl.store(max_logit + at, tl.where(counts, m, 0.0), mask=inside)
    tl.store(log_sum + at, tl.where(counts, log_total, 0.0), mask=inside)
    if ENTROPY:
        tl.store(entropy + at, tl.where(counts, log_total - tl.div_rn(shifted, s), 0.0), mask=inside)
    if EXTRAS:
        tl.store(is_top1 + at, tl.where(counts & (argmax == target), 1.0, 0.0), mask=inside)
        tl.store(mean_logit + at, tl.where(counts, logit_sum / vocab, 0.0).to(tl.float32), mask=inside)
        log_squares = tl.log(squares.to(tl.float64)) - 2 * tl.log(s.to(tl.float64))
        tl.store(log_sum_sq_probs + at, tl.where(counts, log_squares, 0.0).to(tl.float32), mask=inside)


@tuned
@triton.jit(do_not_specialize=["rows", "first_row"])
def differentiate(
    hidden, hidden_stride, hidden_step, head, head_stride, head_step, bias, targets, index, dlogits, dlogits_stride,
    bias_sums, max_logit, log_sum, grad_logprobs, grad_log_sum, grad_entropy, entropy,
    first_row, rows, begin, end, vocab, width, gain, cap, inverse_cap, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    KIND: tl.constexpr, INTERPRETED: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dlogits [rows, end - begin] of hidden [rows, width], and their sums over each row block's rows for the bias."""
    row_block, tile = in_groups(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(end - begin, COLUMNS), GROUP)
    row, inside, at = visited_rows(index, first_row, row_block, rows, ROWS)
    target = tl.load(targets + at, mask=inside, other=-1)
    counts = inside & (target >= 0)
    first = begin + tile * COLUMNS
    x = multiply(
        described(hidden, rows, width, hidden_stride, ROWS, DEPTH, TMA), row_block * ROWS, row, counts, hidden_stride,
        hidden_step, described(head, vocab, width, head_stride, COLUMNS, DEPTH, TMA), first, vocab, head_stride,
        head_step, width, ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
    )  # fmt: skip
    columns = first + tl.arange(0, COLUMNS)
    z = final_logits(x, bias, columns, vocab, gain, cap, KIND)
    row_max = tl.load(max_logit + at, mask=counts, other=0.0)
    row_log_sum = tl.load(log_sum + at, mask=counts, other=0.0)
    log_p = (z - row_max[:, None]) - row_log_sum[:, None]
    through_sum = tl.zeros([ROWS], tl.float32)  # p_v (g_lse - g_lp) - p_v g_H (log p_v + H); 1 - p_y from expm1
    if grad_log_sum is not None:
        through_sum += tl.load(grad_log_sum + at, mask=counts, other=0.0)
    d = tl.exp(log_p)
    own = tl.where(counts & (target < vocab), target, -1).to(tl.int32)  # a tile of 64-bit comparisons would spill
    is_target = columns[None, :] == own[:, None]
    if grad_logprobs is not None:
        grad = tl.load(grad_logprobs + at, mask=counts, other=0.0)
        factor = tl.where(is_target, through_sum[:, None], (through_sum - grad)[:, None])
    else:
        factor = tl.zeros_like(z) + through_sum[:, None]
    if grad_entropy is not None:
        grad_h = tl.load(grad_entropy + at, mask=counts, other=0.0)
        h = tl.load(entropy + at, mask=counts, other=0.0)
        factor -= grad_h[:, None] * (tl.maximum(log_p, LOWEST_LOG_P) + h[:, None])
    d = d * factor
    if grad_logprobs is not None:
        d = tl.where(is_target, d - grad[:, None] * expm1(log_p), d)
    d = d * logit_slope(z, inverse_cap, slope, KIND)
    d = tl.where(counts[:, None] & (columns < end)[None, :], d, 0.0)
    to = dlogits + row[:, None] * dlogits_stride + (columns - begin)[None, :]
    tl.store(to, d.to(dlogits.dtype.element_ty), mask=inside[:, None] & (columns < end)[None, :])
    if bias_sums is not None:
        sums = bias_sums + tl.cast(row_block, tl.int64) * (end - begin) + (columns - begin)
        tl.store(sums, tl.sum(d, 0), mask=columns < end)


def _tile(side: Side, with_more: bool) -> Tile:
    return tile_for(side.hidden.device, side.gemm, MEDIUM if with_more or side.transform.softcap else LIGHT)


def forward(
    side: Side, targets: Tensor, index: Tensor | None, with_entropy: bool, with_extras: bool
) -> tuple[Tensor, ...]:
    """targets [N]: -1 where a row does not count. index [n]: the rows that do, or None to go over all.

    -> logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs, each [N], or [0] if not wanted.
    """
    tile, count = _tile(side, with_entropy or with_extras), targets.shape[0] if index is None else index.shape[0]
    side = readable_side(side)
    hidden, weight, bias = side.tensors()
    vocab, width = weight.shape
    splits = plan.splits_of(vocab, tile.columns)
    fields = FIELDS if with_extras else 3 if with_entropy else 2
    partials = hidden.new_empty((fields, splits.parts, count), dtype=torch.float32)
    best = hidden.new_empty((splits.parts, count) if with_extras else (0,), dtype=torch.int32)
    target_logit = hidden.new_full((count,), float("nan"), dtype=torch.float32)  # stays so where a target is no token
    results = [hidden.new_zeros(targets.shape[0] if wanted else 0, dtype=torch.float32)
               for wanted in (True, True, True, with_entropy, *[with_extras] * 3)]  # fmt: skip
    if count == 0:
        return tuple(results)
    arguments = transform_arguments(side)
    launch(
        fold, (plan.cdiv(count, tile.rows) * splits.parts,),
        hidden, index, *hidden.stride(), weight, *weight.stride(), bias, targets, partials, best, target_logit,
        count, hidden.shape[0], vocab, width, splits.parts, arguments["gain"], arguments["cap"],
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0, TILES=splits.tiles,
        DTYPE=TL_DTYPE[side.gemm], KIND=arguments["KIND"], ENTROPY=with_entropy, EXTRAS=with_extras,
        INTERPRETED=INTERPRETED, TMA=index is None and uses_tma(hidden) and uses_tma(weight),
    )  # fmt: skip
    launch(
        merge, (plan.cdiv(count, plan.ROW_STEP),),
        partials, best, target_logit, targets, index, count, vocab, splits.parts, *results,
        ROWS=plan.ROW_STEP, ENTROPY=with_entropy, EXTRAS=with_extras,
    )  # fmt: skip
    return tuple(results)


def backward(
    upstream: Upstream, side: Side, targets: Tensor, visited: VisitedRows, statistics: Statistics, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed."""
    tile, arguments = _tile(side, False), transform_arguments(side)
    inverse_cap = 1.0 / arguments["cap"] if arguments["cap"] else 0.0
    width = side.head.weight.shape[1]
    head, bias = readable(side.head.weight, side.gemm), contiguous(side.head.bias)
    into = [None if g is None else g.float().contiguous() for g in upstream]

    def dlogits_of(
        operands: Tensor, first: int, rows: int, begin: int, end: int, dlogits: Tensor, bias_sums: Tensor | None
    ) -> None:
        if rows == 0:
            return
        launch(
            differentiate, (plan.cdiv(rows, tile.rows) * plan.cdiv(end - begin, tile.columns),),
            operands, *operands.stride(), head, *head.stride(), bias, targets, visited.rows, dlogits,
            dlogits.stride(0), bias_sums, statistics.max_logit, statistics.log_sum, *into, statistics.entropy,
            first, rows, begin, end, head.shape[0], width, arguments["gain"], arguments["cap"], inverse_cap,
            arguments["slope"],
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0,
            DTYPE=TL_DTYPE[side.gemm], KIND=arguments["KIND"], INTERPRETED=INTERPRETED,
            TMA=uses_tma(operands) and uses_tma(head),
        )  # fmt: skip

    return head_gradient(side, visited, targets >= 0, needs, tile.rows, dlogits_of)
