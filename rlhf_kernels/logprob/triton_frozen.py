"""linear_logprobs of a frozen head in Triton: the fold writes each tile's weights as well, and the vendor's GEMM adds
their product with the head's rows, so that d logprob / d hidden is there after forward: two products.

Of a row, over the vocabulary but the target y, relative to 2^scale, no smaller than any e^z so far (a power of two, so
that weights are restated without rounding), with dz/dx = slope t_v, where t_v is 1 without a soft cap:

    U = sum e^z_v t_v W_v,   mass = sum e^z_v,   d log p_y / d h = slope (mass t_y W_y - U) / (mass + e^z_y)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logits import Side
from .._rows import VisitedRows
from .._triton import INTERPRETED, plan
from .._triton.gradient import add_product, bytes_copied
from .._triton.launch import TL_DTYPE, launch, readable, transform_arguments
from .._triton.maths import exp, finite_max, logit_slope, power_of_2, scaled_exponent
from .._triton.tiles import visited_rows
from .._workspace import workspace_budget_bytes
from . import triton_kernels
from .triton_kernels import Weighing

ROWS, STEP = 16, 128  # of a program over weights or sums: rows, and tiles or columns at a time


@triton.jit(do_not_specialize=["first_token", "rows", "held", "tiles", "parts"])
def restate(
    weights, weights_stride, scales, before, after, sums, targets, first_token, rows, held, tiles, parts, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One scale for all tiles of a slice and for the sums so far, and no weight for the target.

    scales [tiles, 2, held]: scale and mass of each tile; before, after [2, held]: of the slices before, and with it."""
    block, part = tl.program_id(0), tl.program_id(1)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    old = tl.load(before + row)
    scale = old
    for first in range(0, tiles, STEP):
        tile = (first + tl.arange(0, STEP)).to(tl.int64)[:, None]
        of_tiles = tl.load(scales + tile * 2 * held + row[None, :], mask=tile < tiles, other=-float("inf"))
        scale = tl.maximum(scale, tl.max(of_tiles, 0))
    if part == 0:
        mass = tl.load(before + held + row) * power_of_2(old, scale)
        for first in range(0, tiles, STEP):
            tile = (first + tl.arange(0, STEP)).to(tl.int64)[:, None]
            of_tiles = scales + tile * 2 * held + row[None, :]
            factor = power_of_2(tl.load(of_tiles, mask=tile < tiles, other=-float("inf")), scale[None, :])
            mass += tl.sum(tl.load(of_tiles + held, mask=tile < tiles, other=0.0) * factor, 0)
        tl.store(after + row, scale)
        tl.store(after + held + row, mass)
    own = tl.load(targets + row, mask=inside, other=-1) - first_token
    for tile in range(part * TILES, tl.minimum(part * TILES + TILES, tiles)):
        factor = power_of_2(tl.load(scales + tl.cast(tile, tl.int64) * 2 * held + row), scale)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        changes = (factor < 1.0) | ((own >= tile * COLUMNS) & (own < tile * COLUMNS + COLUMNS))
        if tl.max((inside & changes).to(tl.int32), 0) != 0:
            at = weights + row[:, None] * weights_stride + column[None, :]
            w = tl.load(at, mask=inside[:, None], other=0.0)
            w = tl.where(column[None, :] == own[:, None], 0.0, w * factor[:, None]).to(w.dtype)
            tl.store(at, w, mask=inside[:, None])
    factor = tl.where(old == -float("inf"), 1.0, power_of_2(old, scale))  # nothing was summed yet
    if tl.min(tl.where(inside, factor, 1.0), 0) < 1.0:
        for first in range(part * STEP, width, parts * STEP):
            column = first + tl.arange(0, STEP)
            here = inside[:, None] & (column < width)[None, :]
            at = sums + row[:, None] * width + column[None, :]
            tl.store(at, tl.load(at, mask=here, other=0.0) * factor[:, None], mask=here)


@triton.jit(do_not_specialize=["rows", "held", "first_row"])
def combine(
    sums, state, target_logit, targets, index, head, head_stride, head_step, directions, first_row, rows, held, vocab,
    width, inverse_cap, slope, ROWS: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """U [rows, width] of `sums`, state [2, held] -> the directions, at the rows' places. Rows that do not count: 0."""
    row, inside, at = visited_rows(index, first_row, tl.program_id(0), rows, ROWS)
    target = tl.load(targets + row, mask=inside, other=-1)
    counts = inside & (target >= 0)
    scale = tl.load(state + row, mask=counts, other=0.0)
    mass = tl.load(state + held + row, mask=counts, other=0.0)
    z = tl.load(target_logit + row, mask=counts, other=0.0)
    none = scale == -float("inf")  # of all others' logits: whatever the target's, nothing is left of the gradient
    total = mass + tl.where(none, 1.0, exp(scaled_exponent(z, finite_max(scale))))
    of_target = tl.div_rn(mass * logit_slope(z, inverse_cap, slope, KIND), total)
    of_sums = tl.div_rn(slope, total)
    column = (tl.program_id(1) * STEP + tl.arange(0, STEP)).to(tl.int64)
    here = (column < width)[None, :]
    known = (counts & (target < vocab))[:, None] & here
    w = tl.load(head + target[:, None] * head_stride + column[None, :] * head_step, mask=known, other=0.0)
    u = tl.load(sums + row[:, None] * width + column[None, :], mask=counts[:, None] & here, other=0.0)
    direction = of_target[:, None] * w.to(DTYPE).to(tl.float32) - of_sums[:, None] * u
    to = directions + at[:, None] * width + column[None, :]
    tl.store(to, tl.where(counts[:, None], direction, 0.0), mask=inside[:, None] & here)


def forward(
    side: Side, targets: Tensor, index: Tensor | None, with_entropy: bool, with_extras: bool
) -> tuple[Tensor, ...]:
    """`triton_kernels.forward` with directions."""
    hidden, weight, bias = side.tensors()
    (vocab, width), gemm, arguments = weight.shape, side.gemm, transform_arguments(side)
    tile = triton_kernels.tile_of(side, not with_extras and bias is None)
    columns = tile.columns
    splits = plan.splits_of(vocab, columns)
    count, visited = targets.shape[0] if index is None else index.shape[0], VisitedRows(index, False)
    a_row = 16 + bytes_copied(side, visited=visited) + splits.parts * 4 * triton_kernels.FIELDS
    of_a_row = splits.tiles * (columns * gemm.itemsize + 8)
    of_a_part = splits.tiles * columns * width * gemm.itemsize if weight.dtype != gemm else 0
    at_once = plan.parts_at_once(count, splits.parts, a_row, of_a_row, of_a_part, workspace_budget_bytes(hidden.device))
    directions = hidden.new_zeros((targets.shape[0], width), dtype=torch.float32)

    def weigh(
        fold_parts: Callable[..., None], first: int, rows: int, chosen: Tensor, places: Tensor, target_logit: Tensor
    ) -> None:
        tiles, blocks = at_once * splits.tiles, plan.cdiv(rows, ROWS)
        held = plan.cdiv(rows, tile.rows) * tile.rows  # whole blocks
        # The interpreter truncates to bf16 where a GPU rounds: there torch rounds.
        weights = hidden.new_empty((held, tiles * columns), dtype=torch.float32 if INTERPRETED else gemm)
        scales = directions.new_empty((tiles, 2, held))
        weight_tiles = targets.new_full((1,), tiles, dtype=torch.int32)
        before = torch.stack((directions.new_full((held,), -torch.inf), directions.new_zeros(held)))
        after = torch.empty_like(before)
        sums = directions[first : first + rows] if index is None else torch.zeros_like(directions[:rows])
        for part in range(0, splits.parts, at_once):
            parts, begin = min(at_once, splits.parts - part), part * splits.tiles * columns
            end = min(begin + parts * splits.tiles * columns, vocab)
            fold_parts(part, parts, weights, weight_tiles, scales, before)
            launch(
                restate, (blocks, parts),
                weights, weights.stride(0), scales, before, after, sums, chosen, begin, rows, held,
                plan.cdiv(end - begin, columns), parts, width,
                ROWS=ROWS, COLUMNS=columns, TILES=splits.tiles, STEP=STEP,
            )  # fmt: skip
            before, after = after, before
            add_product(sums, weights[:rows, : end - begin].to(gemm), weight[begin:end].to(gemm))
        launch(
            combine, (blocks, plan.cdiv(width, STEP)),
            sums, before, target_logit, chosen, places, readable(weight, gemm), *weight.stride(), directions, first,
            rows, held, vocab, width, arguments["inverse_cap"], arguments["slope"],
            ROWS=ROWS, STEP=STEP, DTYPE=TL_DTYPE[gemm], KIND=arguments["KIND"],
        )  # fmt: skip

    weighing = Weighing(directions, 16 + at_once * of_a_row, at_once * of_a_part, weigh)
    return triton_kernels.forward(side, targets, index, with_entropy, with_extras, weighing)
