"""linear_kl and kl_penalty in Triton. Two tiles of fp32 logits, policy's and reference's, share the registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logits import Needs, Side
from .._rows import VisitedRows
from .._triton import INTERPRETED, plan
from .._triton.gradient import forward_chunks, head_gradient, operands_of, places_of, reads_in_place
from .._triton.launch import (
    HEAVIEST,
    HEAVY,
    TL_DTYPE,
    Tile,
    described,
    launch,
    readable_side,
    tile_for,
    transform_arguments,
    tuned,
    uses_tma,
)
from .._triton.maths import (
    empty_kl,
    exp,
    expm1,
    expm1_minus_identity,
    final_logits,
    kl_of_tile,
    logit_slope,
    merge_kl,
)
from .._triton.tiles import in_groups, multiply, visited_rows
from .autograd import Statistics

FIELDS = 7  # of a split's statistics: max, sum, other max, other sum, centre, second, first
STATS = 6  # kept for backward: max, log sum, other max, other log sum, centre, shift


@triton.jit
def _store_part(partials, split, splits, rows, row, inside, m, s, om, os, centre, second, first):
    at = partials + tl.cast(split, tl.int64) * rows + row
    step = tl.cast(splits, tl.int64) * rows
    tl.store(at, m, mask=inside)
    tl.store(at + step, s, mask=inside)
    tl.store(at + 2 * step, om, mask=inside)
    tl.store(at + 3 * step, os, mask=inside)
    tl.store(at + 4 * step, centre, mask=inside)
    tl.store(at + 5 * step, second, mask=inside)
    tl.store(at + 6 * step, first, mask=inside)


@tuned
@triton.jit(do_not_specialize=["rows"])
def fold_kl(
    hidden, hidden_stride, hidden_step, head, head_stride, head_step, bias, gain, cap, width,
    ref_hidden, ref_hidden_stride, ref_hidden_step, ref_head, ref_head_stride, ref_head_step, ref_bias, ref_gain,
    ref_cap, ref_width,
    mask, partials, rows, vocab, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, REF_WHOLE: tl.constexpr,
    TILES: tl.constexpr, DTYPE: tl.constexpr, REF_DTYPE: tl.constexpr, KIND: tl.constexpr, REF_KIND: tl.constexpr,
    POLICY_WEIGHS: tl.constexpr, INTERPRETED: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One row block over one split of the vocabulary, TILES tiles of both models: its statistics of the divergence."""
    row_block, split = in_groups(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    counts = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    m, s, om, os, centre, second, first_order = empty_kl(ROWS)
    for tile in range(TILES):
        first = (split * TILES + tile) * COLUMNS
        if first < vocab:
            columns = first + tl.arange(0, COLUMNS)
            x = multiply(
                hidden, row_block * ROWS, counts, hidden_stride, hidden_step, head, first, vocab, head_stride,
                head_step, width, ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
            )  # fmt: skip
            y = multiply(
                ref_hidden, row_block * ROWS, counts, ref_hidden_stride, ref_hidden_step, ref_head, first, vocab,
                ref_head_stride, ref_head_step, ref_width, ROWS, COLUMNS, DEPTH, REF_WHOLE, REF_DTYPE, INTERPRETED, TMA,
            )  # fmt: skip
            x = final_logits(x, bias, columns, vocab, gain, cap, KIND)
            y = final_logits(y, ref_bias, columns, vocab, ref_gain, ref_cap, REF_KIND)
            known = (columns < vocab)[None, :]
            x = tl.where(known, x, -float("inf"))
            y = tl.where(known, y, -float("inf"))
            if POLICY_WEIGHS:
                bm, bs, bom, bos, bc, b2, b1 = kl_of_tile(x, y)
            else:
                bm, bs, bom, bos, bc, b2, b1 = kl_of_tile(y, x)
            m, s, om, os, centre, second, first_order = merge_kl(
                m, s, om, os, centre, second, first_order, bm, bs, bom, bos, bc, b2, b1
            )
    _store_part(partials, split, splits, rows, row, inside, m, s, om, os, centre, second, first_order)


@triton.jit(do_not_specialize=["first_row", "rows", "stats_rows"])
def merge_kl_splits(partials, index, first_row, mask, kl, stats, rows, stats_rows, splits, ROWS: tl.constexpr):
    """Merges the splits in their order; kl_of of csrc/common/online_softmax.h, in double."""
    row, inside, at = visited_rows(index, first_row, tl.program_id(0), rows, ROWS)
    counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    m, s, om, os, centre, second, first = empty_kl(ROWS)
    step = tl.cast(splits, tl.int64) * rows
    for split in range(splits):
        part = partials + tl.cast(split, tl.int64) * rows + row
        m, s, om, os, centre, second, first = merge_kl(
            m, s, om, os, centre, second, first,
            tl.load(part, mask=inside, other=0.0), tl.load(part + step, mask=inside, other=0.0),
            tl.load(part + 2 * step, mask=inside, other=0.0), tl.load(part + 3 * step, mask=inside, other=0.0),
            tl.load(part + 4 * step, mask=inside, other=0.0), tl.load(part + 5 * step, mask=inside, other=0.0),
            tl.load(part + 6 * step, mask=inside, other=0.0),
        )  # fmt: skip
    total, other_total = s.to(tl.float64), os.to(tl.float64)
    plain_shift = centre.to(tl.float64) - (m.to(tl.float64) - om.to(tl.float64)) - tl.log(total / other_total)
    a, c = second.to(tl.float64) / total, first.to(tl.float64) / total
    b = a - c
    near = (b > -0.5) & (a < 1.0)
    log1p_b = tl.log(1.0 + tl.where(near, b, 0.0))
    noise = 1e-6 * (4.0 + tl.abs(m) + tl.abs(om) + tl.abs(centre)).to(tl.float64)
    near = near & (tl.abs(log1p_b - plain_shift) <= noise)
    value = tl.where(near, a - (b - log1p_b), c + plain_shift)
    value = tl.where(value < 0.0, 0.0, value)
    shift = tl.where(near, log1p_b, plain_shift)
    tl.store(kl + at, tl.where(counts, value, 0.0).to(tl.float32), mask=inside)
    to = stats + at
    tl.store(to, m, mask=counts)
    tl.store(to + stats_rows, tl.log(s), mask=counts)
    tl.store(to + 2 * stats_rows, om, mask=counts)
    tl.store(to + 3 * stats_rows, tl.log(os), mask=counts)
    tl.store(to + 4 * stats_rows, centre, mask=counts)
    tl.store(to + 5 * stats_rows, shift.to(tl.float32), mask=counts)


@tuned
@triton.jit(do_not_specialize=["rows", "first_row", "stats_rows", "begin", "end"])
def differentiate_kl(
    hidden, hidden_stride, hidden_step, head, head_stride, head_step, bias, gain, cap, inverse_cap, slope, width,
    ref_hidden, ref_hidden_stride, ref_hidden_step, ref_head, ref_head_stride, ref_head_step, ref_bias, ref_gain,
    ref_cap, ref_width,
    index, mask, grad_kl, kl, stats, dlogits, dlogits_stride, bias_sums, first_row, rows, stats_rows, begin, end, vocab,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, REF_WHOLE: tl.constexpr,
    DTYPE: tl.constexpr, REF_DTYPE: tl.constexpr, KIND: tl.constexpr, REF_KIND: tl.constexpr,
    POLICY_WEIGHS: tl.constexpr, INTERPRETED: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d loss / d policy logits [rows, end - begin], and their sums over each row block's rows for the bias."""
    row_block, tile = in_groups(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(end - begin, COLUMNS), GROUP)
    _row, inside, at = visited_rows(index, first_row, row_block, rows, ROWS)
    counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    first = begin + tile * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    x = multiply(
        hidden, row_block * ROWS, counts, hidden_stride, hidden_step, head, first, vocab, head_stride, head_step, width,
        ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
    )  # fmt: skip
    y = multiply(
        ref_hidden, row_block * ROWS, counts, ref_hidden_stride, ref_hidden_step, ref_head, first, vocab,
        ref_head_stride, ref_head_step, ref_width, ROWS, COLUMNS, DEPTH, REF_WHOLE, REF_DTYPE, INTERPRETED, TMA,
    )  # fmt: skip
    x = final_logits(x, bias, columns, vocab, gain, cap, KIND)
    y = final_logits(y, ref_bias, columns, vocab, ref_gain, ref_cap, REF_KIND)
    known = (columns < vocab)[None, :]
    x = tl.where(known, x, -float("inf"))
    y = tl.where(known, y, -float("inf"))
    own = stats + at
    m = tl.load(own, mask=counts, other=float("inf"))  # p and q of rows that do not count: 0
    log_sum = tl.load(own + stats_rows, mask=counts, other=0.0)
    om = tl.load(own + 2 * stats_rows, mask=counts, other=float("inf"))
    other_log_sum = tl.load(own + 3 * stats_rows, mask=counts, other=0.0)
    centre = tl.load(own + 4 * stats_rows, mask=counts, other=0.0)
    shift = tl.load(own + 5 * stats_rows, mask=counts, other=0.0)
    grad = tl.load(grad_kl + at, mask=counts, other=0.0)
    if POLICY_WEIGHS:  # p_v (d_v - KL)
        p = exp((x - m[:, None]) - log_sum[:, None])
        d = ((x - y) - centre[:, None]) + shift[:, None]
        value = tl.load(kl + at, mask=counts, other=0.0)
        g = tl.where(p != 0.0, grad[:, None] * p * (d - value[:, None]), 0.0)
    else:  # q_v - p_v, by whichever of p_v expm1(-d) and -q_v expm1(d) has no positive exponent
        p = exp((y - m[:, None]) - log_sum[:, None])
        q = exp((x - om[:, None]) - other_log_sum[:, None])
        d = ((y - x) - centre[:, None]) + shift[:, None]
        near = tl.abs(d) < 1.0
        near_d = tl.where(near, d, 0.0)
        near_value = tl.where(near_d > 0.0, p, q) * expm1(-tl.abs(near_d)) * tl.where(near_d > 0.0, 1.0, -1.0)
        g = grad[:, None] * tl.where(near, near_value, q - p)
    g = g * logit_slope(x, inverse_cap, slope, KIND)
    g = tl.where((columns < end)[None, :], g, 0.0)
    inner = tile * COLUMNS + tl.arange(0, COLUMNS)  # all of the buffer: so no alignment of `end` matters
    to = dlogits + tl.cast(row_block, tl.int64) * ROWS * dlogits_stride
    to += tl.arange(0, ROWS)[:, None] * dlogits_stride + inner[None, :]
    tl.store(to, g.to(dlogits.dtype.element_ty), mask=inside[:, None] & (inner < dlogits_stride)[None, :])
    if bias_sums is not None:
        sums = bias_sums + tl.cast(row_block, tl.int64) * (end - begin) + inner
        tl.store(sums, tl.sum(g, 0), mask=columns < end)


@triton.jit(do_not_specialize=["count"])
def estimate(logprobs, ref_logprobs, out, count, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    """ESTIMATOR: 0 is k1, 1 k2, 2 k3, as in reference.ESTIMATORS."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    policy = tl.load(logprobs + i, mask=inside, other=0.0).to(tl.float32)
    log_ratio = tl.load(ref_logprobs + i, mask=inside, other=0.0).to(tl.float32) - policy
    if ESTIMATOR == 0:
        value = -log_ratio
    elif ESTIMATOR == 1:
        value = 0.5 * log_ratio * log_ratio
    else:
        value = expm1_minus_identity(log_ratio)
    tl.store(out + i, value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def differentiate_estimate(
    grad, logprobs, ref_logprobs, out, count, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """d estimate / d logprobs, times the upstream."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    policy = tl.load(logprobs + i, mask=inside, other=0.0).to(tl.float32)
    log_ratio = tl.load(ref_logprobs + i, mask=inside, other=0.0).to(tl.float32) - policy
    upstream = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    if ESTIMATOR == 0:
        slope = tl.full([BLOCK], 1.0, tl.float32)
    elif ESTIMATOR == 1:
        slope = -log_ratio
    else:
        slope = -expm1(log_ratio)
    tl.store(out + i, upstream * slope, mask=inside)


def _tile(policy: Side, ref: Side) -> Tile:
    """The tile of fp32 where one side is multiplied in it. Two tiles of logits, and the divergence's many terms."""
    gemm = torch.float32 if torch.float32 in (policy.gemm, ref.gemm) else policy.gemm
    capped = policy.transform.softcap or ref.transform.softcap
    return tile_for(policy.hidden.device, gemm, HEAVIEST if capped or gemm == torch.float32 else HEAVY)


def forward(policy: Side, ref: Side, mask: Tensor, index: Tensor | None, policy_weighs: bool) -> tuple[Tensor, Tensor]:
    """mask [N] bool; index [n]: the rows where it is true, or None to go over all. -> kl [N], stats [6, N]"""
    tile, count = _tile(policy, ref), mask.shape[0] if index is None else index.shape[0]
    policy, ref, mask = readable_side(policy), readable_side(ref), mask.contiguous()
    weight, ref_weight = policy.head.weight, ref.head.weight
    (vocab, width), ref_width = weight.shape, ref_weight.shape[1]
    splits = plan.splits_of(vocab, tile.columns)
    kl = policy.hidden.new_zeros(mask.shape[0], dtype=torch.float32)
    stats = policy.hidden.new_zeros((STATS, mask.shape[0]), dtype=torch.float32)
    if count == 0:
        return kl, stats
    own, other = transform_arguments(policy), transform_arguments(ref)
    visited, places = VisitedRows(index, False), places_of(index, mask)
    counted = mask if index is None else mask[index]
    for first, rows in forward_chunks(count, 4 * FIELDS * splits.parts, visited, policy, ref):
        partials = kl.new_empty((FIELDS, splits.parts, rows))
        hidden, ref_hidden = (operands_of(side, visited, counted, first, rows) for side in (policy, ref))
        tma = uses_tma(hidden, weight, ref_hidden, ref_weight)
        launch(
            fold_kl, (plan.cdiv(rows, tile.rows) * splits.parts,),
            described(hidden, tile.rows, tile, tma), *hidden.stride(), described(weight, tile.columns, tile, tma),
            *weight.stride(), policy.head.bias, own["gain"], own["cap"], width,
            described(ref_hidden, tile.rows, tile, tma), *ref_hidden.stride(),
            described(ref_weight, tile.columns, tile, tma), *ref_weight.stride(), ref.head.bias, other["gain"],
            other["cap"], ref_width, counted[first : first + rows], partials, rows, vocab, splits.parts,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0,
            REF_WHOLE=ref_width % tile.depth == 0, TILES=splits.tiles, DTYPE=TL_DTYPE[policy.gemm],
            REF_DTYPE=TL_DTYPE[ref.gemm], KIND=own["KIND"], REF_KIND=other["KIND"], POLICY_WEIGHS=policy_weighs,
            INTERPRETED=INTERPRETED, TMA=tma,
        )  # fmt: skip
        launch(
            merge_kl_splits, (plan.cdiv(rows, plan.ROW_STEP),),
            partials, places, first, mask, kl, stats, rows, mask.shape[0], splits.parts, ROWS=plan.ROW_STEP,
        )  # fmt: skip
    return kl, stats


def backward(
    grad_kl: Tensor,
    statistics: Statistics,
    policy: Side,
    ref: Side,
    mask: Tensor,
    visited: VisitedRows,
    policy_weighs: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the policy's hidden, weight and bias, empty where not needed."""
    tile, own, other = _tile(policy, ref), transform_arguments(policy), transform_arguments(ref)
    leaves, policy, ref, mask = policy, readable_side(policy), readable_side(ref), mask.contiguous()
    head, ref_head = policy.head, ref.head
    (vocab, width), ref_width = head.weight.shape, ref_head.weight.shape[1]
    upstream, places = grad_kl.float().contiguous(), places_of(visited.rows, mask)
    at, ref_operands = -1, ref.hidden

    def dlogits_of(
        operands: Tensor, first: int, rows: int, begin: int, end: int, dlogits: Tensor, bias_sums: Tensor | None
    ) -> None:
        nonlocal at, ref_operands
        if rows == 0:
            return
        if at != first:
            at, ref_operands = first, operands_of(ref, visited, mask, first, rows)
        tma = uses_tma(operands, head.weight, ref_operands, ref_head.weight)
        launch(
            differentiate_kl, (plan.cdiv(rows, tile.rows) * plan.cdiv(end - begin, tile.columns),),
            described(operands, tile.rows, tile, tma), *operands.stride(),
            described(head.weight, tile.columns, tile, tma), *head.weight.stride(), head.bias, own["gain"], own["cap"],
            own["inverse_cap"], own["slope"], width,
            described(ref_operands, tile.rows, tile, tma), *ref_operands.stride(),
            described(ref_head.weight, tile.columns, tile, tma), *ref_head.weight.stride(), ref_head.bias,
            other["gain"], other["cap"], ref_width,
            places, mask, upstream, statistics.kl, statistics.stats, dlogits, dlogits.stride(0), bias_sums,
            first, rows, mask.shape[0], begin, end, vocab,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=width % tile.depth == 0,
            REF_WHOLE=ref_width % tile.depth == 0, DTYPE=TL_DTYPE[policy.gemm], REF_DTYPE=TL_DTYPE[ref.gemm],
            KIND=own["KIND"], REF_KIND=other["KIND"], POLICY_WEIGHS=policy_weighs, INTERPRETED=INTERPRETED,
            TMA=tma,
        )  # fmt: skip

    beside = 0 if reads_in_place(ref, visited) else ref_width * ref.gemm.itemsize
    return head_gradient(leaves, visited, mask, needs, tile.rows, dlogits_of, beside)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    out = torch.empty_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
    if out.numel():
        launch(
            estimate, (plan.cdiv(out.numel(), plan.VECTOR),),
            logprobs.contiguous(), ref_logprobs.contiguous(), out, out.numel(), ESTIMATOR=estimator, BLOCK=plan.VECTOR,
        )  # fmt: skip
    return out


def estimate_kl_backward(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    out = torch.empty_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
    if out.numel():
        launch(
            differentiate_estimate, (plan.cdiv(out.numel(), plan.VECTOR),),
            grad.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(), out, out.numel(), ESTIMATOR=estimator,
            BLOCK=plan.VECTOR,
        )  # fmt: skip
    return out
