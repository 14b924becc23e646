"""The cost model's tables of docs/scaling.md: the plan for GPUs, and the same model against what was measured."""

from __future__ import annotations

import bisect
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.scaling import cost_model as model
from benchmarks.scaling.cost_model import GIB, Device, Shape

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = (0.8, 1.25)  # predicted over measured


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
ROWS = (8192, 16384)  # tokens that count, per GPU


def plan_table() -> list[str]:
    """Where the CPU's plan changes: these sizes are where a law may break."""
    from rlhf_kernels import _C

    lines = [
        "| D, bytes of an element | vocabulary rows of a tile | of held dlogits | one pass over rows up to N = |",
        "| --- | ---: | ---: | ---: |",
    ]
    for d, size in ((256, 4), (512, 4), (1024, 4), (2048, 4), (4096, 4), (1024, 2), (4096, 2)):
        block, budget = model.ROW_BLOCK, model.CPU_BUDGET_BYTES
        tile, group, _, _ = _C.plan_backward(block, 128256, d, size, budget)
        most = bisect.bisect(
            range(1, 10000), 0, key=lambda k: _C.plan_backward(k * block, 128256, d, size, budget)[2] < k * block
        )
        lines.append(f"| {d}, {size} | {tile} | {group} | {most * block:,} |")
    return lines


def range_ms(name: str, phases_of) -> str:
    """Over the assumed shares of the GEMM rate."""
    times = sorted(1e3 * model.seconds(model.gpu(name, share), phases_of) for share in model.GEMM_SHARES)
    return f"{times[0]:.1f} - {times[1]:.1f}"


def assumptions() -> list[str]:
    sheet, device = model.SHEETS["H200"], model.gpu("H200")
    rows = [
        ("bf16 products, TFLOP/s", sheet["flops_per_s"] / 1e12, model.SHARES["gemm"], device.flops_per_s / 1e12),
        ("memory, TB/s", sheet["bytes_per_s"] / 1e12, model.SHARES["memory"], device.bytes_per_s / 1e12),
        ("NVLink, each way, GB/s", model.LINK_BYTES_PER_S / 1e9, model.SHARES["links"], device.link_bytes_per_s / 1e9),
        ("network a GPU, each way, GB/s", model.NETWORK_BYTES_PER_S / 1e9, model.SHARES["links"],
         device.network_bytes_per_s / 1e9),
    ]  # fmt: skip
    lines = ["| H200 | data sheet | assumed to be reached | used |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {what} | {peak:g} | {share:.0%} | {used:.4g} |" for what, peak, share, used in rows]
    l2 = f"{model.L2_BYTES_PER_S / 1e12:g}"
    return [*lines, f"| logit tiles read out of the {device.l2_bytes >> 20} MiB of L2, TB/s | none | | {l2} |", ""]


def op_table() -> list[str]:
    """Every op at one shape: what is counted, and what follows."""
    head, device = HEADS[0], model.gpu("H200")
    lines = [
        f"{head.name}, {ROWS[0]:,} tokens, bf16, one H200. Ranges are those of the GEMM rate, "
        f"{model.GEMM_SHARES[0]:.0%} to {model.GEMM_SHARES[1]:.0%} of the sheet.",
        "",
        "| op | way | TFLOP | memory, GB | logit tiles in L2, GB | ms | GEMM rate kept | bound by | extra GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for op in ("linear_logprobs", "linear_kl", "linear_dpo_loss"):
        shape = Shape(op, ROWS[0], head.d, head.v)
        four = {"linear_logprobs": "four GEMMs", "linear_kl": "six GEMMs", "linear_dpo_loss": "five GEMMs"}[op]
        ways = [("forward", shape, False), (f"total, {four}", shape, True)]
        if op == "linear_dpo_loss":
            ways.append(("total, four GEMMs, logits kept", replace(shape, kept=1.0), True))
        for way, one, total in ways:
            lines.append(op_line(device, op, way, model.native(device, one, total),
                                 model.native_memory_bytes(device, one, total)))  # fmt: skip
        for way, total in (("eager, forward", False), ("eager, total", True)):
            lines.append(op_line(device, op, way, model.eager(device, shape, total),
                                 model.eager_memory_bytes(shape, total)))  # fmt: skip
    return lines


def op_line(device: Device, op: str, way: str, phases: list[model.Phase], memory_bytes: float) -> str:
    flops, size = sum(p.flops for p in phases), sum(p.bytes for p in phases)
    kept = flops / device.flops_per_s / model.seconds(device, phases)
    cells = (op, way, f"{flops / 1e12:.1f}", f"{size / 1e9:.1f}", f"{sum(p.l2_bytes for p in phases) / 1e9:.1f}")
    told = (range_ms(device.name, phases), f"{kept:.0%}", model.bound(device, phases), f"{memory_bytes / GIB:.2f}")
    return f"| {' | '.join((*cells, *told))} |"


def break_even(device: Device, n: int, v: int) -> int:
    """The hidden size from which eager's three GEMMs and passes over its logits take less than four GEMMs."""
    for d in range(256, 16384 + 1, 128):
        shape = Shape("linear_logprobs", n, d, v)
        if model.seconds(device, model.eager(device, shape, True)) < model.seconds(
            device, model.native(device, shape, True)
        ):
            return d
    return 0


def model_table() -> list[str]:
    device = model.gpu("H200")
    lines = [
        "`linear_logprobs`, forward and backward, bf16, one H200.",
        "",
        "| head | tokens | fused, ms | GEMM rate kept | fused, GB moved | fused, extra GiB | eager, ms "
        "| eager, GB moved | eager, extra GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for head in HEADS:
        for n in ROWS:
            shape = Shape("linear_logprobs", n, head.d, head.v)
            ours, theirs = model.native(device, shape, True), model.eager(device, shape, True)
            kept = sum(p.flops for p in ours) / device.flops_per_s / model.seconds(device, ours)
            memory = [model.native_memory_bytes(device, shape, True), model.eager_memory_bytes(shape, True)]
            moved = [sum(phase.bytes for phase in phases) / 1e9 for phases in (ours, theirs)]
            lines.append(
                f"| {head.name} | {n:,} | {range_ms('H200', ours)} | {kept:.0%} | {moved[0]:.0f} "
                f"| {memory[0] / GIB:.2f} | {range_ms('H200', theirs)} | {moved[1]:.0f} "
                f"| {memory[1] / GIB:.1f} |"
            )
    found = [break_even(model.gpu("H200", share), ROWS[0], HEADS[0].v) for share in model.GEMM_SHARES]
    said = f"{found[0]:,} on ({found[1]:,} at the upper end of the GEMM rate)."
    return [
        *lines,
        "",
        "Where logits fit, the fourth GEMM costs more than eager's passes over them from a hidden size of",
        said,
    ]


def parallel_table() -> list[str]:
    device, n = model.gpu("H200"), ROWS[0]
    lines = [
        f"`linear_logprobs`, forward and backward, bf16, {n:,} tokens of each GPU.",
        "",
        "| head | GPUs | way | compute, ms | sent forward, MB | sent backward, MB | sending, ms | of compute "
        "| head + its gradient + scratch, GiB a GPU |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for head in HEADS:
        shape = Shape("linear_logprobs", n, head.d, head.v)
        for gpus in (8, 64):
            inside = model.vocab_parallel(device, shape, model.NODE, gpus // model.NODE)
            ways = [("data-parallel", model.data_parallel(device, shape, gpus))]
            across = ", data-parallel across" if gpus > model.NODE else ""
            ways.append((f"vocab-parallel in a node{across}", inside))
            if gpus > model.NODE:
                ways.append(("vocab-parallel over all", model.vocab_parallel(device, shape, gpus)))
            for way, cost in ways:
                cells = (head.name, str(gpus), way, f"{1e3 * cost.compute_s:.1f}", f"{cost.forward_bytes / 1e6:.2f}")
                share = f"{cost.communication_s / cost.compute_s:.0%}"
                sent = (f"{cost.backward_bytes / 1e6:.0f}", f"{1e3 * cost.communication_s:.1f}", share)
                lines.append(f"| {' | '.join((*cells, *sent, f'{cost.memory_bytes / GIB:.2f}'))} |")
    return lines


# --- against what was measured ---


def evidence_rates(device: dict, folder: Path) -> dict[str, float]:
    """New and old memory, bytes a second, of this very machine."""
    files = (json.loads(path.read_text()) for path in sorted(folder.glob("evidence-*.json")))
    this = {key: device[key] for key in ("device", "cpu_isa")}
    found = next((found for found in files if found["device"] == this), None)
    if found is None:
        return {}
    return {
        "fresh_bytes_per_s": 1e9 * found["machine"]["new memory written, GB/s"],
        "bytes_per_s": 1e9 * found["machine"]["copied, read and written, GB/s"],
    }


def upper_half(rows: list[dict]) -> list[dict]:
    by_products = sorted(rows, key=lambda row: model.shape_of(row).products_flops)
    return by_products[len(by_products) // 2 :]


def calibrated(results: dict, folder: Path) -> Device | None:
    """A CPU's rates out of the larger half of log-probs' rows, where little else counts: the GEMM rate is the median of
    the bare GEMMs', and what a logit costs the median of what native's forward takes beside its products. Where all of
    it takes less than these, its products have a rate of their own, of which a logit's cost is a part. What memory
    costs was measured apart (evidence.py)."""
    rows = [row for row in results["rows"] if model.checkable(row) and compared(row, results)]
    rows = [row for row in rows if row["op"] == "linear_logprobs" and "forward_ms" in row]
    gemms = [row for row in rows if row["contender"] == "bare GEMMs"]
    ours = [row for row in rows if row["contender"] == "native" and not row["masked"]]
    if not gemms or not ours:
        return None
    # Without evidence: a guess, of the right order for one or two cores of a shared machine.
    rates = {"bytes_per_s": 8e9, "fresh_bytes_per_s": 2e9} | evidence_rates(results["device"], folder)
    name = f"{results['device']['device']}, {results['device']['cpu_isa']}"
    device = Device(name, float("inf"), logits_per_s=float("inf"), **rates)
    found = []
    for row in upper_half(gemms):
        beside_s = model.predicted_s(device, row, "forward")
        found.append(model.shape_of(row).products_flops / (model.time_of(row, "forward") - beside_s))
    device, costs_s, own = replace(device, flops_per_s=statistics.median(found)), [], []
    at_once = replace(device, flops_per_s=float("inf"))
    units = model.bare_times(rows, "forward")
    for row in upper_half(ours):
        measured_s, unit = model.time_of(row, "forward"), units.get(model.key_of(row))
        if unit:
            measured_s *= model.predicted_s(device, unit, "forward") / model.time_of(unit, "forward")
        costs_s.append((measured_s - model.predicted_s(device, row, "forward")) / model.shape_of(row).logits)
        own.append(model.shape_of(row).products_flops / (measured_s - model.predicted_s(at_once, row, "forward")))
    if (cost_s := statistics.median(costs_s)) > 0:
        return replace(device, logits_per_s=1 / cost_s)
    return replace(device, native_flops_per_s=statistics.median(own))


def compared(row: dict, results: dict) -> bool:
    """Those that one set of rates serves: on a GPU 16 bits, on a CPU fp32 with all threads."""
    if gpu_of(results):
        return row["dtype"] in ("bfloat16", "float16")
    return row["dtype"] == "float32" and row.get("threads") == results["device"]["threads"]


def checked(results: dict, device: Device) -> list[str]:
    own = f" ({device.native_flops_per_s / 1e9:,.0f} native)" if device.native_flops_per_s else ""
    rates = f"{device.flops_per_s / 1e9:,.0f} GFLOP/s{own}, {device.bytes_per_s / 1e9:,.1f} GB/s"
    seen = device.logits_per_s < 1e12
    logits = f"{device.logits_per_s / 1e9:,.2f} billion logits a second" if seen else "logits too cheap to be seen"
    lines = [f"**{device.name}**: {rates}, {logits}."]
    if device.fresh_bytes_per_s < float("inf"):
        lines[0] = lines[0][:-1] + f", {device.fresh_bytes_per_s / 1e9:,.2f} GB/s into new pages."
    table: dict[tuple, dict[str, str]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}

    def note(row: dict, what: str, ratio: float) -> None:
        key = tuple(row[name] for name in ("op", "dtype", "n", "d", "v", "masked"))
        mark = "" if GOOD[0] <= ratio <= GOOD[1] else " !"
        table.setdefault(key, {})[f"{row['contender']} {what}"] = f"{ratio:.2f}{mark}"
        ratios.setdefault((row["contender"], what), []).append(ratio)

    for row, what, ratio in model.checks(device, results["rows"]):
        if not compared(row, results):
            continue
        note(row, what, ratio)
    for row in filter(model.checkable, results["rows"]):
        peak_mib, shape = row.get("peak_total_mib") or 0, model.shape_of(row, device)
        if compared(row, results) and peak_mib >= 1 and row["contender"] in ("native", "eager"):
            ours = row["contender"] == "native"
            size = model.native_memory_bytes(device, shape, True) if ours else model.eager_memory_bytes(shape, True)
            note(row, "memory", size / model.MIB / peak_mib)
    lines += [
        "",
        "| | rows | median | least | most | within 0.8 to 1.25 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (contender, what), found in ratios.items():
        good = sum(GOOD[0] <= ratio <= GOOD[1] for ratio in found)
        spread = f"{statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f}"
        lines.append(f"| {contender}, {what} | {len(found)} | {spread} | {good} |")
    columns = [f"{contender} {what}" for contender in model.WAYS for what in ("forward", "total", "memory")][:-1]
    lines += [
        "",
        f"| op | N x D x V | masked | {' | '.join(columns)} |",
        f"| --- | --- | ---: |{' ---: |' * len(columns)}",
    ]
    for (op, dtype, n, d, v, masked), cells in table.items():
        found = " | ".join(cells.get(column, "") for column in columns)
        lines.append(f"| {op} {dtype} | {n} x {d} x {v} | {masked:g} | {found} |")
    return [*lines, ""]


def gpu_of(results: dict) -> Device | None:
    return next((model.gpu(name) for name in model.SHEETS if name in results["device"]["device"]), None)


def blocks(files: dict[str, dict], folder: Path = ROOT / "benchmarks/results") -> dict[str, list[str]]:
    lines: list[str] = []
    for results in files.values():
        if device := calibrated(results, folder):
            lines += checked(results, device)
    for path in sorted(folder.glob("gpu-*.json")):
        results = json.loads(path.read_text())
        if device := gpu_of(results):
            lines += checked(results, device)
    return {
        "plan": plan_table(),
        "assumptions": assumptions(),
        "ops": op_table(),
        "heads": model_table(),
        "parallel": parallel_table(),
        "checks": lines or ["No file of results has the rows yet."],
    }
