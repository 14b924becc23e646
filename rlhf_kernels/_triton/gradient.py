"""From dlogits to the gradients of hidden states, head and bias, by slices of the vocabulary:

recompute a slice's dlogits (a Triton kernel) -> dW[slice] = dz^T H, written once -> dH += dz W[slice], in fp32.
The two products are the vendor library's. The caller computes the tiles of dlogits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._logits import Needs, Side
from .._rows import VisitedRows
from .._workspace import workspace_budget_bytes
from . import INTERPRETED
from .plan import ROW_STEP, cdiv, plan_backward, plan_forward

# differentiate(operands [rows, D], first_row, rows, begin, end, dlogits [rows, group], bias_sums [blocks, end - begin])
Differentiate = Callable[[Tensor, int, int, int, int, Tensor, Tensor | None], None]


def operands_of(side: Side, visited: VisitedRows, counted: Tensor, first: int, rows: int) -> Tensor:
    """Hidden states [rows, D] of the rows visited, from the `first` on, as the GEMM reads them. Those that do not count
    (counted [N] bool) are read as 0: a product with NaN would not be."""
    if visited.rows is not None:
        return side.hidden[visited.rows[first : first + rows]].to(side.gemm)
    part = side.hidden[first : first + rows]
    if visited.masked:
        part = part.masked_fill(~counted[first : first + rows, None], 0.0)
    return part.to(side.gemm)


def places_of(index: Tensor | None, rows: Tensor) -> Tensor:
    """The places of the rows visited among `rows` [N]: never None, as kernels would be compiled anew for that."""
    return torch.arange(rows.shape[0], device=rows.device) if index is None else index


def reads_in_place(side: Side, visited: VisitedRows) -> bool:
    """Whether `operands_of` copies nothing."""
    return visited.rows is None and not visited.masked and side.hidden.dtype == side.gemm


def bytes_copied(*sides: Side, visited: VisitedRows) -> int:
    """Of a row, for the GEMMs."""
    return sum(0 if reads_in_place(s, visited) else s.hidden.shape[1] * s.gemm.itemsize for s in sides)


def forward_chunks(
    count: int, scratch: int, visited: VisitedRows, *sides: Side, beside: int = 0
) -> list[tuple[int, int]]:
    """(first, rows): all `count` rows at once where they fit the budget, with `scratch` bytes a row, the copies of
    their hidden states, and `beside` bytes."""
    budget = workspace_budget_bytes(sides[0].hidden.device) - beside
    at_once = plan_forward(count, scratch + bytes_copied(*sides, visited=visited), budget)
    return [(0, count)] if at_once is None else _chunks(count, at_once)


_flags = threading.Lock()  # autograd has a thread for each device


@contextlib.contextmanager
def _exact_sums(device: torch.device) -> Iterator[None]:
    """The vendor's products in the dtypes of the call, and their partial sums not rounded: neither autocast nor what
    torch.backends.cuda.matmul allows changes that. The settings are put back."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    with torch.autocast(device.type, enabled=False), _flags:
        before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
        accumulation = matmul.allow_fp16_accumulation
        try:
            matmul.allow_fp16_accumulation = False
            for name, (_, split_k) in zip(names, before, strict=True):
                setattr(matmul, name, (False, split_k))
            yield
        finally:
            matmul.allow_fp16_accumulation = accumulation
            for name, value in zip(names, before, strict=True):
                setattr(matmul, name, value)


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, in fp32."""
    with _exact_sums(a.device):
        if a.device.type == "cpu" or a.dtype == torch.float32:  # cpu: under the interpreter
            sums.addmm_(a.float(), b.float())
        elif _traced(a):  # which torch 2.11 cannot do with the addmm below
            sums.add_(torch.mm(a, b, out_dtype=torch.float32))
        else:
            torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)


def write_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to = a @ b, summed in fp32 and rounded once."""
    with _exact_sums(a.device):
        if a.device.type == "cpu":
            to.copy_(a.float() @ b.float())
        elif to.dtype == a.dtype and (a.dtype == torch.float32 or not _traced(a)):  # a graph runs under other settings
            torch.mm(a, b, out=to)
        elif to.dtype == torch.float32:
            torch.mm(a, b, out_dtype=torch.float32, out=to)
        else:
            to.copy_(torch.mm(a, b, out_dtype=torch.float32))


def _traced(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor


def head_gradient(
    side: Side,
    visited: VisitedRows,
    counted: Tensor,
    needs: Needs,
    block_rows: int,
    differentiate: Differentiate,
    beside: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed. counted [N] bool: the rows that count;
    `block_rows`: rows of a block, whose sums the bias takes; `beside`: bytes a row that the caller holds."""
    hidden, weight, bias = side.tensors()
    index, gemm, (vocab, width) = visited.rows, side.gemm, weight.shape
    count = counted.shape[0] if index is None else index.shape[0]
    copies, casts = not reads_in_place(side, visited), weight.dtype != gemm
    plan = plan_backward(count, width, gemm, copies, casts, beside, workspace_budget_bytes(hidden.device))
    # ROW_STEP: there is a row to hold even where none counts
    at_once = max(count, 1) if plan.rows_at_once is None else plan.rows_at_once
    chunks = [(0, count)] if plan.rows_at_once is None else _chunks(count, plan.rows_at_once)
    group = min(plan.group, cdiv(vocab, ROW_STEP) * ROW_STEP)
    # The interpreter truncates to bf16 where a GPU rounds: there torch rounds.
    dlogits = hidden.new_empty((at_once, group), dtype=torch.float32 if INTERPRETED else gemm)

    grad_weight = weight.new_empty(weight.shape if needs.weight else 0)
    sums = hidden.new_zeros((count if needs.hidden else 0, width), dtype=torch.float32)
    bias_sums = hidden.new_zeros(vocab if needs.bias else 0, dtype=torch.float32)
    weight_sums = (
        hidden.new_empty((group, width), dtype=torch.float32)
        if needs.weight and plan.rows_at_once is not None
        else None
    )
    operands = operands_of(side, visited, counted, *chunks[0])
    for begin in range(0, vocab, group):
        end = min(begin + group, vocab)
        head_slice = weight[begin:end].to(gemm) if needs.hidden else None
        for first, rows in chunks:
            if len(chunks) > 1:
                operands = operands_of(side, visited, counted, first, rows)
            blocks = (
                hidden.new_empty((cdiv(rows, block_rows), end - begin), dtype=torch.float32) if needs.bias else None
            )
            differentiate(operands, first, rows, begin, end, dlogits, blocks)
            dz = dlogits[:rows, : end - begin].to(gemm)
            if blocks is not None:
                bias_sums[begin:end] += blocks.sum(0)
            if head_slice is not None:
                add_product(sums[first : first + rows], dz, head_slice)
            if weight_sums is not None:
                part = weight_sums[: end - begin]
                add_product(part if first else part.zero_(), dz.T, operands)
            elif needs.weight:
                write_product(grad_weight[begin:end], dz.T, operands)
        if weight_sums is not None:
            grad_weight[begin:end] = weight_sums[: end - begin]

    del dlogits, dz, operands, weight_sums  # before the sums are rounded into memory of their own
    if index is None or not needs.hidden:
        grad_hidden = sums.to(hidden.dtype)
    else:
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        grad_hidden[index] = sums.to(hidden.dtype)
    return grad_hidden, grad_weight, bias_sums if bias is None else bias_sums.to(bias.dtype)


def _chunks(count: int, at_once: int) -> list[tuple[int, int]]:
    return [(first, min(at_once, count - first)) for first in range(0, max(count, 1), at_once)]
