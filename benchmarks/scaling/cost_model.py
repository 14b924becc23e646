"""The products, memory and traffic of the ops on GPUs, and their least time: arithmetic, nothing measured.

Products are counted at an assumed part of the data sheet's rate; the fused ops' logits stay in cache, so products are
all that is counted of them.
"""

from typing import NamedTuple

from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.report.formatting import grid

GIB = 2**30
# NVIDIA's data sheet of the H200 SXM: dense bf16, no sparsity; NVLink's 900 GB/s are both ways together. The network is
# one 400 Gb/s adapter a GPU, as in a DGX.
FLOPS_PER_S, LINK_BYTES_PER_S, NETWORK_BYTES_PER_S, NODE = 989e12, 450e9, 50e9, 8
# Assumed, to be replaced when a GPU was measured: what large GEMMs and collectives reach of these.
GEMM_SHARES, LINK_SHARE = (0.70, 0.75), 0.80
BUDGET_BYTES = 256 * 2**20  # the default workspace on CUDA, all scratch of the fused ops but the fp32 dH
SIZE = 2  # bytes of a bf16


class Head(NamedTuple):
    name: str
    d: int
    v: int


HEADS = [
    Head("Llama 3 8B", 4096, 128256),
    Head("Llama 3 70B", 8192, 128256),
    Head("Qwen 3 4B", 2560, 151936),
    Head("Gemma 2 2B", 2304, 256000),
]
TOKENS = 8192  # that count, per GPU
OPS = (LinearLogprobs, LinearKL, LinearDPO)


def products_s(products: int, n: int, head: Head, share: float) -> float:
    return products * 2 * n * head.d * head.v / (share * FLOPS_PER_S)


def native_extra_bytes(n: int, head: Head) -> float:
    """Beyond inputs and gradients: the workspace and the fp32 dH."""
    return BUDGET_BYTES + 4.0 * n * head.d


def all_reduce_s(size: float, gpus: int) -> float:
    """By rings: inside the node, then a node's parts between nodes; a reduce-scatter is half of it."""
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    in_node_s = size * (inside - 1) / inside / (LINK_SHARE * LINK_BYTES_PER_S)
    return 2 * (in_node_s + size / inside * (nodes - 1) / nodes / (LINK_SHARE * NETWORK_BYTES_PER_S))


class Parallel(NamedTuple):
    way: str
    sent_bytes: float  # of one GPU's collectives, before the ring's factor
    sending_s: float
    memory_bytes: float  # of a GPU: its head, that gradient, scratch


def parallel_ways(head: Head, gpus: int) -> list[Parallel]:
    """Data-parallel: dW is all-reduced. Vocab-parallel: 4 fp32 numbers a row in forward, the fp32 dH in backward; a
    node's part of dW is all-reduced over the other nodes."""
    weight, nodes = SIZE * head.d * head.v, -(-gpus // NODE)
    sending_s, memory_bytes = all_reduce_s(weight, gpus), 2 * weight + native_extra_bytes(TOKENS, head)
    data = Parallel("data-parallel", weight, sending_s, memory_bytes)

    def vocab_parallel(way: str, group: int, replicas: int) -> Parallel:
        rows, shard = TOKENS * group, weight / group
        statistics, grad_hidden = 16.0 * rows, 4.0 * rows * head.d
        across_s = 2 * shard * (replicas - 1) / replicas / (LINK_SHARE * NETWORK_BYTES_PER_S)
        sending_s = all_reduce_s(statistics, group) + all_reduce_s(grad_hidden, group) + across_s
        sent = statistics + grad_hidden + (shard if replicas > 1 else 0)
        return Parallel(way, sent, sending_s, 2 * shard + native_extra_bytes(rows, head))

    across = ", data-parallel across" if nodes > 1 else ""
    ways = [data, vocab_parallel(f"vocab-parallel in a node{across}", NODE, nodes)]
    return ways + ([vocab_parallel("vocab-parallel over all", gpus, 1)] if nodes > 1 else [])


# --- tables ---


def op_table() -> list[str]:
    lines = []
    for head in HEADS:
        for op in OPS:
            cells = [head.name, f"{op.op}, {op.forward_products} and {op.total_products} GEMMs"]
            for products in (op.forward_products, op.total_products):
                least, most = sorted(1e3 * products_s(products, TOKENS, head, share) for share in GEMM_SHARES)
                cells.append(f"{least:.1f} - {most:.1f}")
            memory = (native_extra_bytes(TOKENS, head), 4 * TOKENS * head.v)
            lines.append([*cells, *(f"{size / GIB:.2f}" for size in memory)])
    columns = ["head", "op", "forward, ms", "total, ms", "extra GiB", "fp32 logits, GiB"]
    return [f"{TOKENS:,} tokens, bf16, one H200.", "", *grid(columns, lines, 2)]


def parallel_table() -> list[str]:
    lines = []
    for head in HEADS:
        compute_s = products_s(LinearLogprobs.total_products, TOKENS, head, sum(GEMM_SHARES) / 2)
        for gpus in (8, 64):
            for cost in parallel_ways(head, gpus):
                cells = [f"{1e3 * compute_s:.1f}", f"{cost.sent_bytes / 1e6:.0f}"]
                cells += [f"{1e3 * cost.sending_s:.1f}", f"{cost.sending_s / compute_s:.0%}"]
                lines.append([head.name, str(gpus), cost.way, *cells, f"{cost.memory_bytes / GIB:.2f}"])
    head = ["head", "GPUs", "way", "compute, ms", "sent, MB", "sending, ms", "of compute"]
    head.append("head + its gradient + scratch, GiB a GPU")
    text = f"`linear_logprobs`, forward and backward, bf16, {TOKENS:,} tokens of each GPU."
    return [text, "", *grid(head, lines, 3)]
