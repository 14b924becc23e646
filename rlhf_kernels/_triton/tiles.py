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
    if index is not None:
        at = tl.load(index + first_row + row, mask=inside, other=0)
    else:
        at = first_row + row
    return row, inside, at


@triton.jit
def described(data, count, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """What `load_block` reads: a tensor descriptor (TMA, Hopper and newer), or the pointer as it is."""
    if TMA:
        return tl.make_tensor_descriptor(data, [count, width], [stride, 1], [ROWS, COLUMNS])
    else:
        return data


@triton.jit
def load_block(
    source, first, index, inside, stride, step, k, width, DEPTH: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr
):
    """[rows, DEPTH] from column k: of the rows `first`, `first` + 1, ... by TMA, or of the rows `index`. What lies
    outside is 0. WHOLE: width is a multiple of DEPTH."""
    if TMA:
        return source.load([first, k])
    else:
        columns = (k + tl.arange(0, DEPTH)).to(tl.int64)  # a transposed tensor's step is as long as its row
        mask = inside[:, None]
        if not WHOLE:
            mask = mask & (columns < width)[None, :]
        return tl.load(source + index[:, None] * stride + columns[None, :] * step, mask=mask, other=0.0)


@triton.jit
def multiply(
    hidden,
    first_row,
    row_index,
    row_inside,
    hidden_stride,
    hidden_step,
    head,
    first_column,
    vocab,
    head_stride,
    head_step,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] fp32: rows `row_index` of the hidden states times the head's from first_column, in DTYPE."""
    columns = first_column + tl.arange(0, COLUMNS)
    head_index, head_inside = columns.to(tl.int64), columns < vocab
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, width, DEPTH):
        h = load_block(
            hidden, first_row, row_index, row_inside, hidden_stride, hidden_step, k, width, DEPTH, WHOLE, TMA
        ).to(DTYPE)
        w = load_block(
            head, first_column, head_index, head_inside, head_stride, head_step, k, width, DEPTH, WHOLE, TMA
        ).to(DTYPE)
        if INTERPRETED:  # the interpreter multiplies 16-bit numbers wrongly; products of the upcast ones are exact
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        sums = tl.dot(h, w.T, sums, input_precision="ieee")
    return sums
