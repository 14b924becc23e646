"""A tile of raw logits in registers: rows of hidden states against rows of the head, fp32 sums."""

import triton
import triton.language as tl


@triton.jit
def in_groups(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Program number -> (row block, column block): all columns of GROUP row blocks, row blocks fastest.

    Programs that run at the same time then share slices of the head, and their GROUP blocks of hidden states stay in L2
    while they walk through the vocabulary.
    """
    per_group = GROUP * column_blocks
    first = program // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def visited_rows(index, first_row, block, rows, ROWS: tl.constexpr):
    """A block's rows among those visited, which of them there are, and their places among all rows, int64."""
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    return row, inside, tl.load(index + first_row + row, mask=inside, other=0)


@triton.jit
def load_block(
    source, first, inside, stride, step, k, width,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, DEPTH] of the rows `first`, `first` + 1, ... from column k, by a tensor descriptor (TMA) or pointers. What
    lies outside is 0. WHOLE: width is a multiple of DEPTH."""
    if TMA:
        return source.load([first, k])
    else:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        columns = (k + tl.arange(0, DEPTH)).to(tl.int64)  # a transposed tensor's step is as long as its row
        mask = inside[:, None]
        if not WHOLE:
            mask = mask & (columns < width)[None, :]
        return tl.load(source + row[:, None] * stride + columns[None, :] * step, mask=mask, other=0.0)


@triton.jit
def add_product(
    sums, hidden, first_row, row_inside, hidden_stride, hidden_step, head, first_column, vocab, head_stride, head_step,
    k, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """sums [ROWS, COLUMNS] fp32 += the hidden states from first_row times the head's rows from first_column, in DTYPE:
    of the inner dimension only DEPTH from k on."""
    inside = first_column + tl.arange(0, COLUMNS) < vocab
    h = load_block(hidden, first_row, row_inside, hidden_stride, hidden_step, k, width, ROWS, DEPTH, WHOLE, TMA)
    w = load_block(head, first_column, inside, head_stride, head_step, k, width, COLUMNS, DEPTH, WHOLE, TMA)
    h = h.to(DTYPE)
    w = w.to(DTYPE)
    if INTERPRETED:  # the interpreter multiplies 16-bit numbers wrongly; products of the upcast ones are exact
        h = h.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(h, w.T, sums, input_precision="ieee")


@triton.jit
def multiply(
    hidden, first_row, row_inside, hidden_stride, hidden_step, head, first_column, vocab, head_stride, head_step, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] fp32: the whole product."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, width, DEPTH):
        sums = add_product(
            sums, hidden, first_row, row_inside, hidden_stride, hidden_step, head, first_column, vocab, head_stride,
            head_step, k, width, ROWS, COLUMNS, DEPTH, WHOLE, DTYPE, INTERPRETED, TMA,
        )  # fmt: skip
    return sums
