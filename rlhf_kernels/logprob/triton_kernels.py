"""linear_logprobs in Triton: logits stay in registers; only statistics, and dlogits of a slice, are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logits import Needs, Side
from .._rows import VisitedRows
from .._triton import INTERPRETED, plan
from .._triton.gradient import forward_chunks, head_gradient, operands_of, places_of
from .._triton.launch import (
    HEAVY,
    LIGHT,
    MEDIUM,
    TL_DTYPE,
    Tile,
    contiguous,
    described,
    launch,
    readable,
    readable_side,
    tile_for,
    transform_arguments,
    tuned,
    uses_tma,
)
from .._triton.maths import (
    IDENTITY,
    LOG2_E,
    LOWEST_LOG_P,
    SOFTCAP,
    empty_softmax,
    exp,
    expm1,
    filled_past,
    final_logits,
    finite_max,
    logit_slope,
    merge_softmax,
    rescale_softmax,
    scaled_exponent,
)
from .._triton.tiles import add_product, in_groups, multiply, visited_rows
from .autograd import Statistics, Upstream

MOST_ABOVE = tl.constexpr(80.0)  # of a target over all others, in nats: beyond, their weights are 0 in fp32 anyway
FIELDS = 5  # of a split's statistics: max, sum, shifted, squares, logit sum


@triton.jit
def _store(partials, field, split, splits, rows, row, inside, value):
    tl.store(partials + tl.cast(field * splits + split, tl.int64) * rows + row, value, mask=inside)


@tuned
@triton.jit(do_not_specialize=["rows", "first_split", "parts"])
def fold(
    hidden, hidden_stride, hidden_step, head, head_stride, head_step, bias, targets, partials, best, target_logit,
    weights, weight_tiles, scales, carried, first_split, parts, rows, vocab, width, splits, gain, cap,
    inverse_cap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr,
    DTYPE: tl.constexpr, KIND: tl.constexpr, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, INTERPRETED: tl.constexpr,
    TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One row block over one split of the vocabulary, TILES tiles: its softmax statistics, and the target's logit. Of a
    frozen head (triton_frozen.py) also each tile's weights, and of their rows scale and mass: scales [tiles, 2, rows],
    carried [2, rows], with rows of whole blocks."""
    row_blocks = tl.cdiv(rows, ROWS)
    row_block, part = in_groups(tl.program_id(0), row_blocks, parts, GROUP)
    split = first_split + part
    row = row_block * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1)
    counts = inside & (target >= 0)
    own = tl.where(counts & (target < vocab), target, -1).to(tl.int32)  # a tile of 64-bit comparisons would spill
    m, s, shifted, squares = empty_softmax(ROWS)
    logit_sum = tl.zeros([ROWS], tl.float32)
    argmax = tl.zeros([ROWS], tl.int32)
    first = split * TILES * COLUMNS
    tiles = tl.minimum(TILES, tl.cdiv(vocab - first, COLUMNS))
    k = 0
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    # One loop over all tiles and their depths, so that the next tile is read while this one's exponentials are computed
    for _ in range(tiles * tl.cdiv(width, DEPTH)):
        z = add_product(
            z, hidden, row_block * ROWS, counts, hidden_stride, hidden_step, head, first, vocab, head_stride,
            head_step, k, width, ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
        )  # fmt: skip
        k += DEPTH
        if k >= width:
            columns = first + tl.arange(0, COLUMNS)
            z = final_logits(z, bias, columns, vocab, gain, cap, KIND)
            known = (columns < vocab)[None, :]
            if EXTRAS:
                logit_sum += tl.sum(tl.where(known, z, 0.0), 1)
            z = tl.where(known, z, -float("inf"))  # no branch around it: ptxas would then wait for each instruction
            here = (own >= first) & (own < first + COLUMNS)
            logit = tl.sum(tl.where(columns[None, :] == own[:, None], z, 0.0), 1)
            tl.store(target_logit + row, logit, mask=here)
            tile_max = tl.max(z, 1)
            if EXTRAS:
                argmax = tl.where(tile_max > m, first + tl.argmax(z, 1), argmax)
            new_max = tl.maximum(m, tile_max)
            s, shifted, squares = rescale_softmax(m, s, shifted, squares, new_max)
            m = new_max
            delta = z - finite_max(m)[:, None]
            e = exp(delta)
            s += tl.sum(e, 1)
            if ENTROPY:
                shifted += tl.sum(e * tl.maximum(delta, LOWEST_LOG_P), 1)
            if EXTRAS:
                squares += tl.sum(e * e, 1)
            if weights is not None:
                others, mass = tile_max, tl.sum(e, 1)
                if tl.max(here.to(tl.int32), 0) != 0:  # triton_frozen.restate takes the target's weight out
                    mass = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == (own - first)[:, None], 0.0, e), 1)
                    others = tl.where(here, finite_max(m) + tl.log(mass), others)
                scale = tl.maximum(tl.load(carried + row), tl.ceil(others * LOG2_E))
                factor = exp(tl.minimum(scaled_exponent(finite_max(m), finite_max(scale)), MOST_ABOVE))
                column = first - first_split * TILES * COLUMNS
                of_tile = scales + tl.cast(column // COLUMNS, tl.int64) * 2 * row_blocks * ROWS + row
                tl.store(of_tile, scale)
                tl.store(of_tile + row_blocks * ROWS, factor * mass)
                w = e * factor[:, None]
                if KIND == SOFTCAP:  # at -inf, past the vocabulary, the slope would be infinite
                    w = w * logit_slope(tl.maximum(z, -cap), inverse_cap, 1.0, KIND)
                stride = tl.load(weight_tiles) * COLUMNS  # here, or addresses would be in registers during the product
                to = weights + tl.cast(row_block, tl.int64) * ROWS * stride + column
                to += tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
                tl.store(to, w.to(weights.dtype.element_ty))  # whole blocks of rows: masks take registers too
            z = tl.zeros([ROWS, COLUMNS], tl.float32)
        first = tl.where(k >= width, first + COLUMNS, first)  # outside the branch, of which the loads are independent
        k = tl.where(k >= width, 0, k)

    _store(partials, 0, split, splits, rows, row, inside, m)
    _store(partials, 1, split, splits, rows, row, inside, s)
    if ENTROPY:
        _store(partials, 2, split, splits, rows, row, inside, shifted)
    if EXTRAS:
        _store(partials, 3, split, splits, rows, row, inside, squares)
        _store(partials, 4, split, splits, rows, row, inside, logit_sum)
        _store(best, 0, split, splits, rows, row, inside, argmax)


@triton.jit(do_not_specialize=["rows", "first_row"])
def merge(
    partials, best, target_logit, targets, index, first_row, rows, vocab, splits,
    logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs,
    ROWS: tl.constexpr, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Merges the splits in their order, and writes the results at the row's place. Rows that do not count: 0."""
    row, inside, at = visited_rows(index, first_row, tl.program_id(0), rows, ROWS)
    target = tl.load(targets + row, mask=inside, other=-1)
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
@triton.jit(do_not_specialize=["rows", "first_row", "begin", "end"])
def differentiate(
    hidden, hidden_stride, hidden_step, head, head_stride, head_step, bias, targets, index, dlogits, dlogits_stride,
    bias_sums, max_logit, log_sum, grad_logprobs, grad_log_sum, grad_entropy, entropy,
    first_row, rows, begin, end, vocab, width, gain, cap, inverse_cap, slope,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    KIND: tl.constexpr, INTERPRETED: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dlogits [rows, end - begin] of hidden [rows, width], and their sums over each row block's rows for the bias."""
    row_block, tile = in_groups(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(end - begin, COLUMNS), GROUP)
    _row, inside, at = visited_rows(index, first_row, row_block, rows, ROWS)
    target = tl.load(targets + at, mask=inside, other=-1)
    counts = inside & (target >= 0)
    first = begin + tile * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    z = multiply(
        hidden, row_block * ROWS, counts, hidden_stride, hidden_step, head, first, vocab, head_stride, head_step, width,
        ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
    )  # fmt: skip
    z = final_logits(z, bias, columns, vocab, gain, cap, KIND)
    row_max = tl.load(max_logit + at, mask=counts, other=float("inf"))  # p of rows that do not count: 0
    row_log_sum = tl.load(log_sum + at, mask=counts, other=0.0)
    through_sum = tl.zeros([ROWS], tl.float32)  # p_v (g_lse - g_lp) - p_v g_H (log p_v + H); 1 - p_y from expm1
    grad, grad_h, h = through_sum, through_sum, through_sum
    if grad_log_sum is not None:
        through_sum = tl.load(grad_log_sum + at, mask=counts, other=0.0)
    if grad_logprobs is not None:
        grad = tl.load(grad_logprobs + at, mask=counts, other=0.0)
    if grad_entropy is not None:
        grad_h = tl.load(grad_entropy + at, mask=counts, other=0.0)
        h = tl.load(entropy + at, mask=counts, other=0.0)

    own = tl.where(counts & (target < vocab), target, -1).to(tl.int32)  # a tile of 64-bit comparisons would spill
    d_y = grad
    any_target = grad_logprobs is not None and tl.max(((own >= first) & (own < first + COLUMNS)).to(tl.int32), 0) != 0
    if any_target:  # expm1 once a row, not once a logit
        z_y = tl.sum(tl.where(columns[None, :] == own[:, None], z, 0.0), 1)
        log_p_y = (z_y - row_max) - row_log_sum
        d_y = exp(log_p_y) * (through_sum - grad_h * (tl.maximum(log_p_y, LOWEST_LOG_P) + h)) - grad * expm1(log_p_y)
    log_p = (z - row_max[:, None]) - row_log_sum[:, None]
    factor = (through_sum - grad)[:, None]
    if grad_entropy is not None:
        factor -= grad_h[:, None] * (tl.maximum(log_p, LOWEST_LOG_P) + h[:, None])
    d = exp(log_p) * factor
    if any_target:  # another comparison than above, or 128 predicates would be kept in registers between the two
        d = tl.where(tl.arange(0, COLUMNS)[None, :] == (own - first)[:, None], d_y[:, None], d)
    if KIND != IDENTITY:
        d = d * logit_slope(z, inverse_cap, slope, KIND)
    d = filled_past(d, first, end, COLUMNS, 0.0)
    inner = tile * COLUMNS + tl.arange(0, COLUMNS)  # all of the buffer: so no alignment of `end` matters
    to = dlogits + tl.cast(row_block, tl.int64) * ROWS * dlogits_stride
    to += tl.arange(0, ROWS)[:, None] * dlogits_stride + inner[None, :]
    tl.store(to, d.to(dlogits.dtype.element_ty), mask=inside[:, None] & (inner < dlogits_stride)[None, :])
    if bias_sums is not None:
        sums = bias_sums + tl.cast(row_block, tl.int64) * (end - begin) + inner
        tl.store(sums, tl.sum(d, 0), mask=columns < end)


def tile_of(side: Side, light: bool) -> Tile:
    """A head that is cast as it is read, and rows that start off 16 bytes, pass through registers."""
    weight = side.head.weight
    heavy = side.transform.softcap or weight.dtype != side.gemm or weight.shape[1] * weight.element_size() % 16
    return tile_for(side.hidden.device, side.gemm, HEAVY if heavy else LIGHT if light else MEDIUM)


class Weighing(NamedTuple):
    """What forward does beside statistics where the head is frozen: triton_frozen.py."""

    directions: Tensor
    bytes_a_row: int
    beside: int  # bytes, whatever the rows
    # weigh(fold_parts(first_split, parts, *the arguments of fold from `weights` on), first row, rows, their targets,
    # places, target_logit [rows])
    weigh: Callable[[Callable[..., None], int, int, Tensor, Tensor, Tensor], None]


def forward(
    side: Side,
    targets: Tensor,
    index: Tensor | None,
    with_entropy: bool,
    with_extras: bool,
    weighing: Weighing | None = None,
) -> tuple[Tensor, ...]:
    """targets [N]: -1 where a row does not count. index [n]: the rows that do, or None to go over all.

    -> logprobs, max_logit, log_sum, entropy, is_top1, mean_logit, log_sum_sq_probs, each [N], or [0] if not wanted; and
    the directions d logprob / d hidden [N, D] of a frozen head, or [0].
    """
    light = not with_extras and side.head.bias is None
    tile, count = tile_of(side, light), targets.shape[0] if index is None else index.shape[0]
    side = readable_side(side)
    weight, bias = side.head.weight, side.head.bias
    vocab, width = weight.shape
    splits = plan.splits_of(vocab, tile.columns)
    fields = FIELDS if with_extras else 3 if with_entropy else 2
    make, arguments = side.hidden.new_empty, transform_arguments(side)
    results = [side.hidden.new_zeros(targets.shape[0] if wanted else 0, dtype=torch.float32)
               for wanted in (True, True, True, with_entropy, *[with_extras] * 3)]  # fmt: skip
    results.append(make(0, dtype=torch.float32) if weighing is None else weighing.directions)
    if count == 0:
        return tuple(results)
    visited, places = VisitedRows(index, False), places_of(index, targets)
    own = targets if index is None else targets[index]
    scratch, beside = splits.parts * 4 * (fields + with_extras), 0
    if weighing is not None:
        scratch, beside = scratch + weighing.bytes_a_row, weighing.beside

    def visit(first: int, rows: int) -> None:
        partials = make((fields, splits.parts, rows), dtype=torch.float32)
        best = make((splits.parts, rows) if with_extras else (0,), dtype=torch.int32)
        target_logit = torch.full_like(partials[0, 0], float("nan"))  # stays so where a target is no token
        hidden, chosen = operands_of(side, visited, own, first, rows), own[first : first + rows]
        tma = uses_tma(hidden, weight)

        def fold_parts(first_split: int, parts: int, *weighed: Tensor | None) -> None:
            launch(
                fold, (plan.cdiv(rows, tile.rows) * parts,),
                described(hidden, tile.rows, tile, tma), *hidden.stride(), described(weight, tile.columns, tile, tma),
                *weight.stride(), bias, chosen, partials, best, target_logit, *weighed, first_split, parts, rows, vocab,
                width, splits.parts, arguments["gain"], arguments["cap"], arguments["inverse_cap"],
                ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0,
                TILES=splits.tiles, DTYPE=TL_DTYPE[side.gemm], KIND=arguments["KIND"], ENTROPY=with_entropy,
                EXTRAS=with_extras, INTERPRETED=INTERPRETED, TMA=tma,
            )  # fmt: skip

        if weighing is None:
            fold_parts(0, splits.parts, *[None] * 4)
        else:
            weighing.weigh(fold_parts, first, rows, chosen, places, target_logit)
        launch(
            merge, (plan.cdiv(rows, plan.ROW_STEP),),
            partials, best, target_logit, chosen, places, first, rows, vocab, splits.parts, *results[:-1],
            ROWS=plan.ROW_STEP, ENTROPY=with_entropy, EXTRAS=with_extras,
        )  # fmt: skip

    for first, rows in forward_chunks(count, scratch, visited, side, beside=beside):
        visit(first, rows)
    return tuple(results)


def backward(
    upstream: Upstream, side: Side, targets: Tensor, visited: VisitedRows, statistics: Statistics, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed."""
    light = side.head.bias is None and upstream.entropy is None
    tile, arguments = tile_of(side, light), transform_arguments(side)
    width = side.head.weight.shape[1]
    head, bias = readable(side.head.weight, side.gemm), contiguous(side.head.bias)
    into, places = [None if g is None else g.float().contiguous() for g in upstream], places_of(visited.rows, targets)

    def dlogits_of(
        operands: Tensor, first: int, rows: int, begin: int, end: int, dlogits: Tensor, bias_sums: Tensor | None
    ) -> None:
        if rows == 0:
            return
        tma = uses_tma(operands, head)
        launch(
            differentiate, (plan.cdiv(rows, tile.rows) * plan.cdiv(end - begin, tile.columns),),
            described(operands, tile.rows, tile, tma), *operands.stride(), described(head, tile.columns, tile, tma),
            *head.stride(), bias, targets, places, dlogits, dlogits.stride(0), bias_sums, statistics.max_logit,
            statistics.log_sum, *into, statistics.entropy, first, rows, begin, end, head.shape[0], width,
            arguments["gain"], arguments["cap"], arguments["inverse_cap"], arguments["slope"],
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0,
            DTYPE=TL_DTYPE[side.gemm], KIND=arguments["KIND"], INTERPRETED=INTERPRETED, TMA=tma,
        )  # fmt: skip

    return head_gradient(side, visited, targets >= 0, needs, tile.rows, dlogits_of)
