"""`python -m benchmarks.on_gpu --out FILE`: every op on one GPU, native and in Triton, against bare GEMMs, eager torch
and other packages.

The rates of the machine come first: a large GEMM, a copy. Then, op by op and shape by shape, contenders take turns.
FILE is JSON and written after every row, so that a run that is interrupted leaves what it measured. What a contender
cannot do, or what there was no time for, has a row that says why. NOTES, in the file too, say what the columns mean.

`--device cpu --tiny` runs every contender that can run on a CPU at tiny shapes, in seconds: a test of this file. With
TRITON_INTERPRET=1 Triton is among them.
`--small` runs every op once, at small shapes and without rivals: made for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.on_gpu_jobs import OURS, ROWS, CannotRun, Contender, Job, jobs, normal, tuner_choices

JOB_SECONDS, MOST_ROUNDS = 8.0, 9  # turns of one job; slow contenders take fewer, but at least two
NOTES = {
    "forward_ms, total_ms": "median, min and max of `rounds` turns; forward without autograd, total = forward and "
    "backward with gradients of hidden and weight in fresh memory; backward_ms = total - forward, of medians",
    "gemm_fraction": "flops that the fused op cannot do without / time / the rate of the bare GEMMs of the same shape "
    "and the same turns: products of hidden and weight in forward; a recomputed one, dH and dW besides in total",
    "over_native": "median time / that of the native backend in the same turns: forward, total; below 1 it is faster",
    "first_s": "the first forward and the first forward and backward, with whatever is compiled or tuned for them",
    "tuner": "what Triton's tuner chose, by kernel",
    "peak_mib": "most memory beyond inputs (and, in total, beyond the gradients of hidden and weight)",
    "max_error": f"largest |value - fp64's|, nats, over {ROWS} rows; of the loss, for DPO",
    "hidden_gradient_error": f"|dH - fp64's| / |fp64's| of {ROWS} rows, Frobenius",
    "batch_invariant": f"the bits of {ROWS} rows alone are those within the whole batch",
}


class Clock:
    """Times, memory and out-of-memory of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def ms(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run: Callable[[], object], besides: int = 0) -> float | None:
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before - besides) / 2**20, 1)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


# --- measuring ---


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    said = str(error).strip().partition("\n")[0][:160]
    return said if isinstance(error, CannotRun) else f"cannot run here: {type(error).__name__}: {said}"


def rounded(error: Tensor) -> float | str:
    return float(f"{error:.3g}") if error.isfinite() else str(error.item())  # JSON has no word for nan


def try_out(job: Job, contender: Contender, clock: Clock) -> dict:
    """What is known of a contender besides its times; raises what it raises. It is warm afterwards."""
    found: dict = {}
    results: list[Tensor] = []
    first_ms = clock.ms(lambda: results.append(job.call(contender)))
    whole = results.pop()
    per_row = whole.dim() == 1
    if per_row:
        with torch.no_grad():
            alone = contender.run(*job.inputs(ROWS))
        judged = whole[:ROWS]
        found["batch_invariant"] = torch.equal(alone, judged)
        found["max_error"] = rounded((judged.double() - job.truth).abs().max())
    elif job.pairs:
        with torch.no_grad():
            found["max_error"] = rounded((contender.run(*job.inputs(ROWS)).double() - job.truth).abs())
    job.drop_gradients()
    found["first_s"] = round((first_ms + clock.ms(lambda: job.step(contender))) / 1e3, 2)
    if contender.name == "triton":
        found["tuner"] = tuner_choices(job.op)
    if job.true_gradient is not None:
        assert job.hidden.grad is not None
        difference = job.hidden.grad[:ROWS].double() - job.true_gradient
        found["hidden_gradient_error"] = rounded(difference.norm() / job.true_gradient.norm())
    job.drop_gradients()
    found["peak_total_mib"] = clock.peak_mib(lambda: job.step(contender), job.hidden.nbytes + job.weight.nbytes)
    job.drop_gradients()
    if forward_is_timed(contender):
        found["peak_forward_mib"] = clock.peak_mib(lambda: job.call(contender))
    return found


def forward_is_timed(contender: Contender) -> bool:
    return not contender.name.endswith(", sum")  # their forward is their total


def spread(times_ms: list[float]) -> dict:
    median = statistics.median(times_ms)
    return {"median": round(median, 4), "min": round(min(times_ms), 4), "max": round(max(times_ms), 4)}


def measure(job: Job, clock: Clock, started: float, seconds: float, most_rounds: int) -> Iterator[dict]:
    """Rows of one job."""
    job.make()
    able: dict[str, dict] = {}
    runs: dict[str, list[Callable[[], object] | None]] = {"bare GEMMs": [*job.bare_gemms()]}
    for contender in job.contenders:
        row = job.label() | {"contender": contender.name, "note": contender.note, "status": "measured"}
        gone = time.perf_counter() - started
        if gone > seconds or (contender.slow_start and gone > seconds / 2):
            yield row | {"status": "not measured: time"}
            continue
        try:
            able[contender.name] = row | try_out(job, contender, clock)
        except Exception as error:
            refused = reason_of(error)
        else:
            forward = partial(job.call, contender) if forward_is_timed(contender) else None
            runs[contender.name] = [forward, partial(job.step, contender)]
            clock.free()  # what it kept for itself is not the next one's lack
            continue
        job.drop_gradients()  # the error, which held the frames that hold tensors, is gone
        clock.free()
        yield row | {"status": refused}

    times: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    failed: dict[str, str] = {}
    taken, rounds = time.perf_counter(), -(most_rounds > 1)  # the first turn fetches memory and does not count
    while rounds < min(2, most_rounds) or (rounds < most_rounds and time.perf_counter() - taken < JOB_SECONDS):
        if rounds == 0:
            times = {name: [[], []] for name in runs}
        for name, pair in runs.items():
            for kept, run in zip(times[name], pair, strict=True):
                job.drop_gradients()
                if run is None or name in failed:
                    continue
                try:
                    kept.append(clock.ms(run))
                except Exception as error:
                    failed[name] = reason_of(error)
        rounds += 1
    job.drop_gradients()

    if "bare GEMMs" in failed:  # nothing to compare with; most likely the device itself is gone
        raise CannotRun(f"bare GEMMs: {failed['bare GEMMs']}")
    bare_ms = [statistics.median(kept) for kept in times["bare GEMMs"]]
    flops = 2 * job.n * job.d * job.v
    rates = [flops * k / ms for k, ms in zip((job.forward_products, job.total_products), bare_ms, strict=True)]
    native_ms = [] if "native" in failed else [statistics.median(kept) for kept in times.get("native", []) if kept]
    able = {"bare GEMMs": job.label() | {"contender": "bare GEMMs", "status": "measured"}} | able
    for name, row in able.items():
        if name in failed:
            yield row | {"status": failed[name]}
            continue
        forward_ms, total_ms = times[name]
        row |= {"rounds": rounds, "total_ms": spread(total_ms), "bare_gemms_ms": [round(ms, 4) for ms in bare_ms]}
        part = 1.0 if name == "bare GEMMs" else job.counted / job.n  # masked rows need no product
        columns = [("forward", forward_ms, job.forward_products), ("total", total_ms, job.total_products)]
        for (what, kept, products), rate in zip(columns, rates, strict=True):
            if kept:
                fraction = part * flops * products / statistics.median(kept) / rate
                row[f"gemm_fraction_{what}"] = round(fraction, 4)
        if name == "bare GEMMs":
            row["tflops"] = [round(rate * 1e-9, 3) for rate in rates]
        if native_ms and name not in ("native", "bare GEMMs"):
            pairs = zip(("forward", "total"), times[name], native_ms, strict=True)
            row["over_native"] = {what: round(statistics.median(kept) / ms, 4) for what, kept, ms in pairs if kept}
        if forward_ms:
            row["forward_ms"] = spread(forward_ms)
            row["backward_ms"] = round(statistics.median(total_ms) - statistics.median(forward_ms), 4)
        yield row


def rates_of(clock: Clock, tiny: bool) -> dict:
    """The most that this device does: bf16 products of a large GEMM, and a copy's bytes, read and written."""
    size, megabytes = (256, 16) if tiny else (8192, 1024)
    a, b, c = (normal(size, size, seed=k, dtype=torch.bfloat16, device=clock.device) for k in range(3))
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    gemm, copy = partial(torch.mm, a, b, out=c), partial(target.copy_, source)
    times: dict[str, list[float]] = {"gemm": [], "copy": []}
    for turn in range(13):
        for name, run in (("gemm", gemm), ("copy", copy)):
            ms = clock.ms(run)
            if turn > 2:
                times[name].append(ms)
    return {
        "gemm": {"n": size, "dtype": "bfloat16", "ms": spread(times["gemm"])}
        | {"tflops": round(2e-9 * size**3 / statistics.median(times["gemm"]), 3)},
        "copy": {"mib": megabytes, "ms": spread(times["copy"])}
        | {"gb_per_s": round(2e-6 * source.nbytes / statistics.median(times["copy"]), 1)},
    }


# --- the file ---


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment(device: torch.device) -> dict:
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device)
        machine = {
            "device": has.name,
            "capability": f"{has.major}.{has.minor}",
            "multiprocessors": has.multi_processor_count,
            "memory_mib": has.total_memory >> 20,
            "l2_mib": has.L2_cache_size >> 20,
        }
        asked = "driver_version,power.limit,clocks.max.sm"
        told = output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={device.index or 0}")
        machine |= dict(zip(asked.split(","), map(str.strip, told.split(",")), strict=False))
        machine["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        machine = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    peers = {
        name: installed.get(name, "not installed") for name in ("triton", "trl", "liger-kernel", "cut-cross-entropy")
    }
    built = rk.build_info()
    return {
        "device": machine,
        "versions": {"rlhf_kernels": built["version"], "torch": torch.__version__, "cuda": torch.version.cuda} | peers,
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "backends": list(rk.available_backends(device)),
        "workspace_budget_mib": built["workspace_budget_mib"],
    }


class Results:
    """The JSON, on the disk after every change; and a line per row on the screen."""

    def __init__(self, path: Path, head: dict) -> None:
        self.path, self.content = path, head | {"notes": NOTES, "rates": None, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        whole.replace(self.path)  # at no time half a file

    def add(self, row: dict) -> None:
        self.content["rows"].append(row)
        self.write()
        what = f"{row['op']} {row['dtype']} {row['n']}x{row['d']}x{row['v']} masked {row['masked']:.0%}"
        said = row["status"]
        if said == "measured":
            said = "  ".join(
                f"{name} {row[f'{name}_ms']['median']:9.3f} ms ({row[f'gemm_fraction_{name}']:.2f})"
                for name in ("forward", "total")
                if f"{name}_ms" in row
            )
        print(f"{what:52} {row['contender']:20} {said}", flush=True)


def excused(row: dict) -> bool:
    return row["status"] in ("measured", "not measured: time")


def run_small(device: torch.device, backend: str) -> None:
    """Every op, forward and backward, with sizes that fill no tile, several tiles, masks, bias and every output."""
    rk.set_workspace_budget(8)
    n, d, v, by = 70, 72, 9001, {"backend": backend}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        new = partial(normal, device=device, dtype=dtype)
        hidden, weight = new(n, d, seed=1).requires_grad_(), new(v, d, seed=2, scale=d**-0.5).requires_grad_()
        bias, ref_hidden = new(v, seed=3).requires_grad_(), new(n, d, seed=4)
        targets = torch.arange(n, device=device) * 127
        targets[::3] = -100
        outputs = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
        found = rk.linear_logprobs(hidden, weight, targets, bias, logit_softcap=30.0, outputs=outputs, **by)
        assert found.entropy is not None
        kl = rk.linear_kl(hidden, weight, ref_hidden, weight.detach(), targets != -100, bias=bias, **by)
        penalty = rk.kl_penalty(found.logprobs, found.logprobs.detach() - 0.1, "k3", **by)
        pairs, reference = (2, n // 2, d), {"ref_hidden": ref_hidden.view(2, n // 2, d), "ref_weight": weight.detach()}
        dpo = rk.linear_dpo_loss(hidden.view(pairs), weight, targets.view(2, -1), **reference, **by).loss
        rewards = rk.bradley_terry_loss(found.logprobs[: n // 2], found.logprobs[n // 2 :], **by)
        (found.logprobs.sum() + found.entropy.sum() + kl.sum() + penalty.sum() + dpo + rewards.sum()).backward()
        assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in (hidden, weight, bias))
    rk.set_workspace_budget(None)
    print(f"every op ran by {backend}, forward and backward")


def backends_here(device: torch.device) -> tuple[str, ...]:
    """Those that must run: both on a GPU; elsewhere native, and Triton where its interpreter is on."""
    able = rk.available_backends(device)
    return tuple(name for name in OURS if device.type == "cuda" or name == "native" or name in able)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="the JSON")
    parser.add_argument("--seconds", type=float, default=400, help="no contender is started after so many")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--backends", help="of native,triton: what is measured, and must run (default: both on a GPU)")
    parser.add_argument("--no-rivals", action="store_true", help="measure this project and bare GEMMs alone")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this file")
    parser.add_argument("--small", action="store_true", help="every op once, nothing timed, nothing written")
    parser.add_argument("--head-only", action="store_true", help="write device, versions and facts; measure nothing")
    parser.add_argument("--fact", action="append", default=[], metavar="NAME=VALUE", help="to be written into the JSON")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny tries this file without one")
    backends = tuple(options.backends.split(",")) if options.backends else backends_here(options.device)
    if not set(backends) <= set(OURS):
        parser.error(f"--backends takes {' and '.join(OURS)}, with a comma between; got {options.backends}")
    if options.small:
        for backend in backends if options.backends else ("auto",):
            run_small(options.device, backend)
        return None

    started, clock = time.perf_counter(), Clock(options.device)
    facts = dict(fact.split("=", 1) for fact in options.fact)
    results = Results(options.out, facts | environment(options.device))
    if options.head_only:
        return None
    results.content["rates"] = rates_of(clock, options.tiny)
    clock.free()
    results.write()
    for job in jobs(options.device, options.tiny, backends, not options.no_rivals):
        try:
            if time.perf_counter() - started > options.seconds:
                raise CannotRun("not measured: time")
            for row in measure(job, clock, started, options.seconds, 1 if options.tiny else MOST_ROUNDS):
                results.add(row)
        except Exception as error:  # of the inputs, the truth or the bare GEMMs; contenders' own are rows already
            results.add(job.label() | {"contender": "all", "status": reason_of(error)})
        del job
        clock.free()
    results.content["seconds"] = round(time.perf_counter() - started, 1)
    results.write()
    print(f"written to {options.out}")
    broken = [row for row in results.content["rows"] if row["contender"] in (*OURS, "all") and not excused(row)]
    if broken:  # a rival that cannot run is a finding; the backends that are measured must run
        raise SystemExit(
            "\n".join(f"{row['op']} {row['dtype']}, {row['contender']}: {row['status']}" for row in broken)
        )
    return None


if __name__ == "__main__":
    main()
