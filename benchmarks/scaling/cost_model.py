"""`python -m benchmarks.scaling.cost_model`: what the ops must multiply, read, write and send, and how long that takes.

An op is a list of phases, one after another; a phase takes as long as its slowest part: products, memory, or logits
that a row kernel folds out of cache. `check` holds the same lists against measured rows. The sizes of tiles are the
compiled plan's (csrc/common/tile_plan.h). Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from rlhf_kernels._workspace import logits_to_keep

MIB, GIB = 2**20, 2**30
ROW_BLOCK = 64  # CPU: rows of a logit tile (kRowBlock)
ROW_STEP = 16  # CPU: of the last one, GEMMs go over the rows up to this multiple (kRowStep)
MMAP_BYTES = 32 * MIB  # glibc's largest threshold: a block of that size is mapped anew, page by page, at every call
STATE_BYTES = 32  # CUDA: a row's running statistics
GEMM_LIBRARY_BYTES = 32 * MIB  # CUDA: cuBLASLt's workspace
CUDA_BUDGET_BYTES, CPU_BUDGET_BYTES = 256 * MIB, 64 * MIB


@dataclass(frozen=True)
class Device:
    """Rates are what a kernel can reach, not the data sheet's: see `SHARES`."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    logits_per_s: float  # that a row kernel folds, or turns into dlogits, out of cache
    fresh_bytes_per_s: float = float("inf")  # CPU: memory that is mapped anew
    native_flops_per_s: float = (
        0.0  # CPU: of oneDNN's products, where torch takes another library's and these are faster
    )
    l2_bytes: int = 0  # 0: a CPU
    memory_bytes: float = float("inf")
    link_bytes_per_s: float = 0.0  # to GPUs of the same node, each way
    network_bytes_per_s: float = 0.0  # to other nodes, each way, per GPU


# NVIDIA's data sheets of the SXM boards: dense bf16, no sparsity; NVLink's 900 GB/s are both ways together. The network
# is one 400 Gb/s adapter a GPU, as in a DGX.
SHEETS = {
    "H200": {"flops_per_s": 989e12, "bytes_per_s": 4.8e12, "memory_bytes": 141e9},
    "H100": {"flops_per_s": 989e12, "bytes_per_s": 3.35e12, "memory_bytes": 80e9},
}
LINK_BYTES_PER_S, NETWORK_BYTES_PER_S, NODE, L2_BYTES = 450e9, 50e9, 8, 50 * MIB
# Assumed, to be replaced when a GPU was measured: of the sheet's rates, what large GEMMs, copies and collectives reach;
# and bytes of a logit tile that a row kernel reads out of L2 a second.
SHARES = {"gemm": 0.72, "memory": 0.90, "links": 0.80}
GEMM_SHARES = (0.70, 0.75)  # the range
L2_BYTES_PER_S = 4.2e12


def gpu(name: str, gemm_share: float = SHARES["gemm"]) -> Device:
    sheet = SHEETS[name]
    return Device(
        name,
        flops_per_s=gemm_share * sheet["flops_per_s"],
        bytes_per_s=SHARES["memory"] * sheet["bytes_per_s"],
        logits_per_s=L2_BYTES_PER_S / 4,
        l2_bytes=L2_BYTES,
        memory_bytes=sheet["memory_bytes"],
        link_bytes_per_s=SHARES["links"] * LINK_BYTES_PER_S,
        network_bytes_per_s=SHARES["links"] * NETWORK_BYTES_PER_S,
    )


@dataclass(frozen=True)
class Shape:
    """`n`: rows that count; `kept`: share of the logits that forward keeps for backward (1: three GEMMs)."""

    op: str
    n: int
    d: int
    v: int
    element_bytes: int = 2
    kept: float = 0.0

    @property
    def logits(self) -> int:
        return self.n * self.v

    @property
    def products_flops(self) -> int:
        return 2 * self.n * self.d * self.v

    @property
    def gradient_bytes(self) -> int:
        return self.element_bytes * self.d * (self.n + self.v)


class Phase(NamedTuple):
    name: str
    flops: float = 0
    bytes: float = 0  # of memory
    logits: float = 0  # passes of a row kernel, in logits
    fresh_bytes: float = 0  # of them, written to memory that a call maps anew
    l2_bytes: float = 0  # of logit tiles, which stay in cache


def scaled(phase: Phase, share: float) -> Phase:
    return Phase(phase.name, *(share * value for value in phase[1:]))


class Plan(NamedTuple):
    """Of the compiled plan, what counts here."""

    rows: int  # that GEMMs go over
    slices: int  # of the head, over each of which all hidden states pass
    groups: int  # of slices, after each of which dH is added to
    passes: int  # over rows: above one, dW has an fp32 accumulator
    scratch_bytes: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def heads_of(shape: Shape) -> int:
    """Whose logits are there at once."""
    return 2 if shape.op == "linear_kl" else 1


def plan_of(device: Device, shape: Shape, backward: bool, budget_bytes: int | None = None) -> Plan:
    from rlhf_kernels import _C

    n, d, v, size = max(shape.n, 1), shape.d, shape.v, shape.element_bytes
    heads = heads_of(shape)
    if device.l2_bytes:
        budget = (budget_bytes or CUDA_BUDGET_BYTES) - GEMM_LIBRARY_BYTES
        tile, _, group, _, held, scratch = _C.plan_device(
            n, v, d, heads, size, False, False, backward, device.l2_bytes, budget
        )
        passes = ceil_div(n, held)
        return Plan(n, ceil_div(v, tile), ceil_div(v, group), passes, scratch + GEMM_LIBRARY_BYTES)
    budget, rows = budget_bytes or CPU_BUDGET_BYTES, ceil_div(n, ROW_STEP) * ROW_STEP
    if backward:
        tile, group, chunk, scratch = _C.plan_backward(n, v, d, size, budget, d * (heads - 1))
        return Plan(rows, ceil_div(v, tile), ceil_div(v, group), ceil_div(rows, chunk), scratch)
    tile, _, splits, chunk, _ = _C.plan_forward(n, v, d, size, budget, 2)
    return Plan(rows, ceil_div(v, tile), 1, ceil_div(rows, chunk), chunk * (heads * d * size + 8 * splits))


def hidden_bytes(device: Device, shape: Shape, plan: Plan) -> float:
    """Hidden states, read once for every slice where they do not fit the cache beside it."""
    once = plan.rows * shape.d * shape.element_bytes
    fits = once <= device.l2_bytes / 3 if device.l2_bytes else True  # a CPU's blocks stay in its last cache
    return once if fits else once * plan.slices


def fresh(device: Device, size: float) -> float:
    return size if not device.l2_bytes and size >= MMAP_BYTES else 0


# --- this project's ops ---


def products(device: Device, shape: Shape, name: str, backward: bool, heads: int = 1) -> list[Phase]:
    """Logit tiles of `heads` heads: a GEMM, then a row kernel that folds them or turns them into dlogits."""
    plan = plan_of(device, shape, backward)
    operands = hidden_bytes(device, shape, plan) + plan.passes * shape.v * shape.d * shape.element_bytes
    logits = plan.rows * shape.v
    rows = {
        "bytes": (shape.element_bytes * logits if device.l2_bytes else 0)
        if backward
        else 2 * STATE_BYTES * shape.n * plan.slices,
        "logits": heads * logits * (2 if backward and not device.l2_bytes else 1),  # CPU: dlogits in both layouts
        "l2_bytes": 8 * heads * logits,
    }
    return [
        Phase(f"{name}: GEMM", heads * 2 * logits * shape.d, heads * operands),
        Phase(f"{name}: rows", **rows),
    ]


def keep_logits(device: Device, shape: Shape) -> list[Phase]:
    """fp32 logits go to memory, which CUDA clears first, and backward reads them instead of another product. On a CPU
    that memory is the last step's."""
    heads = heads_of(shape)
    first, rows = products(device, shape, "forward", False, heads)
    size, clears = 4 * heads * shape.logits, 2 if device.l2_bytes else 1
    return [
        first._replace(bytes=first.bytes + clears * size),
        rows._replace(bytes=rows.bytes + size, l2_bytes=0),
    ]


def gradients(device: Device, shape: Shape) -> list[Phase]:
    plan, size = plan_of(device, shape, True), shape.element_bytes
    rows, weight, dlogits = plan.rows * shape.d, shape.v * shape.d, size * plan.rows * shape.v
    flops = 2 * plan.rows * shape.d * shape.v
    sums = 8 * weight * plan.passes if plan.passes > 1 else 0  # an fp32 accumulator read and written every pass
    in_memory = dlogits if device.l2_bytes else 0  # a CPU's plan keeps a group's dlogits in its last cache
    return [
        Phase(
            "dW", flops, in_memory + plan.groups * rows * size + weight * size + sums, 0, fresh(device, weight * size)
        ),
        Phase("dH", flops, in_memory + plan.passes * weight * size + (8 * plan.groups - 4) * rows),
        Phase("dH, rounded", 0, (4 + 2 * size) * rows),  # cleared, then scattered to
    ]


def native(device: Device, shape: Shape, total: bool) -> list[Phase]:
    heads = heads_of(shape)
    kept = shape.kept if total else 0.0
    phases = [scaled(phase, 1 - kept) for phase in products(device, shape, "forward", False, heads)]
    if kept:
        phases += [scaled(phase, kept) for phase in keep_logits(device, shape)]
    if shape.op == "linear_dpo_loss":
        phases += products(device, shape, "reference", False)
    if not total:
        return phases
    phases += [scaled(phase, 1 - kept) for phase in products(device, shape, "backward", True, heads)]
    if kept:
        stored, passes = (shape.element_bytes, 1) if device.l2_bytes else (0, 2)  # dlogits: see `products`
        logits = heads * shape.logits
        rows = Phase("backward: rows", 0, 4 * logits + stored * shape.logits, passes * logits)
        phases.append(scaled(rows, kept))
    return [*phases, *gradients(device, shape)]


def native_memory_bytes(device: Device, shape: Shape, total: bool) -> float:
    """Beyond inputs and gradients: scratch, fp32 dH, what is kept; on a CPU, gathered hidden states, which no plan
    has."""
    heads = heads_of(shape)
    kept = int(4 * heads * shape.logits * shape.kept) if total else 0
    budget = CUDA_BUDGET_BYTES if device.l2_bytes else CPU_BUDGET_BYTES - kept  # kept on CUDA: what the budget was for
    plan = plan_of(device, shape, total, budget)
    gathered = 0 if device.l2_bytes else heads * shape.n * shape.d * shape.element_bytes
    return plan.scratch_bytes + kept + gathered + (4 * plan.rows * shape.d if total else 0)


# --- eager torch: logits, in fp32, log-softmax, gather ---


def eager_head(device: Device, shape: Shape) -> list[Phase]:
    size, logits = shape.element_bytes, shape.logits
    casts = [] if size == 4 else [Phase("to fp32", 0, (size + 4) * logits, 0, fresh(device, 4 * logits))]
    operands = size * shape.d * (shape.n + shape.v)
    product = Phase("GEMM", shape.products_flops, operands + size * logits, 0, fresh(device, size * logits))
    cost = 0 if device.l2_bytes else logits
    return [product, *casts, Phase("log-softmax", 0, 8 * logits, cost, fresh(device, 4 * logits))]


def eager(device: Device, shape: Shape, total: bool) -> list[Phase]:
    size, logits = shape.element_bytes, shape.logits
    kl = [Phase("KL: 4 maps, 1 sum", 0, (8 + 12 + 12 + 4) * logits)] if shape.op == "linear_kl" else []
    phases = eager_head(device, shape) * (1 if shape.op == "linear_logprobs" else 2) + kl
    if not total:
        return phases
    cost = 0 if device.l2_bytes else logits
    head_bytes = size * shape.d * (shape.n + 2 * shape.v)
    zeros = Phase("zeros of gather", 0, 4 * logits, 0, fresh(device, 4 * logits))
    return [
        *phases,
        Phase("KL backward: 3 maps, 1 sum", 0, (8 + 8 + 12 + 12) * logits) if kl else zeros,
        Phase("log-softmax backward", 0, 12 * logits, cost, fresh(device, 4 * logits)),
        *([] if size == 4 else [Phase("rounded", 0, (size + 4) * logits)]),
        Phase("dW", shape.products_flops, size * logits + head_bytes, 0, fresh(device, size * shape.v * shape.d)),
        Phase("dH", shape.products_flops, size * logits + head_bytes),
    ]


def eager_memory_bytes(shape: Shape, total: bool) -> float:
    """The most at once, less the gradients, which are not there yet when it is reached. KL: what torch's profiler says
    of it; the reference of DPO is gone when the policy's logits come."""
    if shape.op == "linear_kl":
        return 20 * shape.logits
    if not total:
        return 8 * shape.logits
    return max(12 * shape.logits - shape.gradient_bytes, shape.element_bytes * shape.logits)


def bare_gemms(device: Device, shape: Shape, total: bool) -> list[Phase]:
    forward = {"linear_logprobs": 1}.get(shape.op, 2)
    count = forward + (4 if shape.op == "linear_kl" else 3) if total else forward
    weight_bytes = shape.element_bytes * shape.v * shape.d
    wrote = Phase("dW", 0, weight_bytes, 0, fresh(device, weight_bytes)) if total else Phase("none")
    return [Phase("GEMMs", count * shape.products_flops, count * weight_bytes), wrote]


WAYS = {"native": native, "eager": eager, "bare GEMMs": bare_gemms}


# --- time ---


def parts_s(device: Device, phase: Phase) -> dict[str, float]:
    mapped = phase.fresh_bytes / device.fresh_bytes_per_s
    return {
        "products": phase.flops / device.flops_per_s,
        "memory": phase.bytes / device.bytes_per_s + mapped,
        "logits": phase.logits / device.logits_per_s,
    }


def seconds(device: Device, phases: list[Phase]) -> float:
    """On a CPU the parts of a phase overlap with nothing; on a GPU it is as slow as its slowest part."""
    if not device.l2_bytes:
        return sum(sum(parts_s(device, phase).values()) for phase in phases)
    return sum(max(parts_s(device, phase).values()) for phase in phases)


def bound(device: Device, phases: list[Phase]) -> str:
    """What takes the time, and its share."""
    by: dict[str, float] = {}
    for phase in phases:
        parts = parts_s(device, phase)
        worst = max(parts, key=lambda name: parts[name])
        by[worst] = by.get(worst, 0) + parts[worst]
    most = max(by, key=lambda name: by[name])
    return f"{most} {by[most] / sum(by.values()):.0%}"


# --- many GPUs ---


def reduce_scatter_s(device: Device, size: float, gpus: int) -> float:
    """By rings: inside the node, then a node's parts between nodes."""
    inside, nodes = min(gpus, NODE), ceil_div(gpus, NODE)
    return size * (inside - 1) / inside / device.link_bytes_per_s + (
        size / inside * (nodes - 1) / nodes / device.network_bytes_per_s
    )


def all_reduce_s(device: Device, size: float, gpus: int) -> float:
    return 2 * reduce_scatter_s(device, size, gpus)


class Parallel(NamedTuple):
    compute_s: float
    forward_bytes: float  # of one GPU's collectives, before the ring's factor
    backward_bytes: float
    communication_s: float
    memory_bytes: float  # of a GPU: its head, that gradient, scratch


def head_memory(device: Device, shape: Shape) -> float:
    return 2 * shape.element_bytes * shape.v * shape.d + native_memory_bytes(device, shape, True)


def data_parallel(device: Device, shape: Shape, gpus: int) -> Parallel:
    """`shape` on each; dW is all-reduced (sharded training: reduce-scattered, in half the time)."""
    size = shape.element_bytes * shape.v * shape.d
    compute = seconds(device, native(device, shape, True))
    return Parallel(compute, 0, size, all_reduce_s(device, size, gpus), head_memory(device, shape))


def vocab_parallel(device: Device, shape: Shape, gpus: int, replicas: int = 1) -> Parallel:
    """The rows of all `gpus` on each of them, with a part of the vocabulary; `replicas` of the group share dW."""
    part = replace(shape, n=shape.n * gpus, v=ceil_div(shape.v, gpus))
    statistics, grad_hidden = 16 * part.n, 4 * part.n * shape.d  # 4 numbers a row; fp32
    sent_s = all_reduce_s(device, statistics, gpus) + all_reduce_s(device, grad_hidden, gpus)
    shard = shape.element_bytes * part.v * shape.d
    if replicas > 1:  # the same part of other nodes' heads: the network alone
        sent_s += 2 * shard * (replicas - 1) / replicas / device.network_bytes_per_s
    compute = seconds(device, native(device, part, True))
    backward = grad_hidden + (shard if replicas > 1 else 0)
    return Parallel(compute, statistics, backward, sent_s, head_memory(device, part))


# --- against what was measured ---


def shape_of(row: dict, device: Device | None = None) -> Shape:
    """With a CPU as `device`: and what its default budget keeps for backward."""
    counted = row["n"] if row["contender"] in ("eager", "bare GEMMs") else round(row["n"] * (1 - row["masked"]))
    shape = Shape(row["op"], counted, row["d"], row["v"], {"float32": 4, "float64": 8}.get(row["dtype"], 2))
    if row["contender"] != "native" or device is None or device.l2_bytes:
        return shape
    heads, rows = heads_of(shape), ceil_div(counted, ROW_BLOCK) * ROW_BLOCK
    kept = logits_to_keep(row["n"], row["v"], row["d"], torch.device("cpu"), row["d"] * (heads - 1))
    return replace(shape, kept=min(1.0, kept / (heads * rows * row["v"])))


def checkable(row: dict) -> bool:
    known = row.get("contender") in WAYS and row.get("op") in ("linear_logprobs", "linear_kl", "linear_dpo_loss")
    return known and row.get("status") == "measured" and "total_ms" in row


def time_of(row: dict, what: str) -> float | None:
    return row[f"{what}_ms"]["min"] / 1e3 if f"{what}_ms" in row else None


def predicted_s(device: Device, row: dict, what: str) -> float:
    if row["contender"] == "native" and device.native_flops_per_s:
        device = replace(device, flops_per_s=device.native_flops_per_s)
    return seconds(device, WAYS[row["contender"]](device, shape_of(row, device), what == "total"))


def key_of(row: dict) -> tuple:
    shape = ("op", "dtype", "n", "d", "v", "s", "t", "pairs_per_response", "masked", "softcap", "model")
    return tuple(row.get(name) for name in (*shape, "sweep", "threads"))


def bare_times(rows: list[dict], what: str) -> dict[tuple, dict]:
    """By key, the bare GEMMs of the same turns. Not of fewer rows than a tile: they are bound by other things."""
    bare = (row for row in rows if checkable(row) and row["contender"] == "bare GEMMs" and row["n"] >= ROW_BLOCK)
    return {key_of(row): row for row in bare if f"{what}_ms" in row}


def checks(device: Device, rows: list[dict]) -> Iterator[tuple[dict, str, float]]:
    """Row, forward or total, predicted over measured; native and eager in units of the bare GEMMs, predicted and
    measured, so that what slows the machine down for a minute cancels."""
    for what in ("forward", "total"):
        bare = bare_times(rows, what)
        for row in filter(checkable, rows):
            measured_s = time_of(row, what)
            if not measured_s:
                continue
            ratio, unit = predicted_s(device, row, what) / measured_s, bare.get(key_of(row))
            if unit and row["contender"] != "bare GEMMs":
                ratio *= time_of(unit, what) / predicted_s(device, unit, what)
            yield row, what, ratio


def main() -> None:
    from benchmarks.scaling.growth import write

    write()


if __name__ == "__main__":
    main()
