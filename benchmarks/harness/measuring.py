"""How a job is measured: peers take turns in one process, and a row says what came out. The same on CPU and GPU."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.harness.jobs import ROWS, normal
from benchmarks.harness.peers import CannotRun, Peer
from benchmarks.harness.record import ROOT

LONGEST_S = 20.0  # a step that takes longer is not waited for


class Measurable(Protocol):
    """What is asked of a job."""

    n: int
    d: int
    v: int
    op: str
    device: torch.device
    counted: int
    threads: int | None
    forward_products: int
    total_products: int
    peers: list[Peer]
    truth: Tensor
    true_gradient: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]: ...
    def label(self) -> dict: ...
    def needs(self) -> set[str]: ...
    def make(self) -> None: ...
    def call(self, peer: Peer, rows: int | None = None) -> Tensor: ...
    def step(self, peer: Peer, rows: int | None = None) -> None: ...
    def share(self, rows: int) -> float: ...
    def drop_gradients(self) -> None: ...
    def bare_gemms(self) -> tuple[Callable[[], object], Callable[[], object]] | None: ...
    def arguments(self) -> dict: ...


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

    def peak_mib(self, run: Callable[[], object], besides: int = 0) -> float:
        """Of a GPU. A process keeps memory that it once had, so on CPU it takes a fresh one: peak_memory.py."""
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
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    said = str(error).strip().partition("\n")[0][:160]
    return said if isinstance(error, CannotRun) else f"cannot run here: {type(error).__name__}: {said}"


def rounded(error: Tensor) -> float | str:
    return float(f"{error:.3g}") if error.isfinite() else str(error.item())  # JSON has no word for nan


@contextmanager
def budget_of(peer: Peer) -> Iterator[None]:
    if peer.budget_mib is None:
        yield
        return
    rk.set_workspace_budget(peer.budget_mib)
    try:
        yield
    finally:
        rk.set_workspace_budget(None)


def runs_of(job: Measurable, peer: Peer) -> tuple[Callable[[], object] | None, Callable[[], object]]:
    """Forward (None where it is the total), forward and backward."""
    return None if peer.sums else partial(job.call, peer), partial(job.step, peer)


def try_out(job: Measurable, peer: Peer, clock: Clock) -> dict:
    """What is known of a peer besides its times and, on CPU, its memory; raises what it raises. It is warm then."""
    found: dict = {}
    results: list[Tensor] = []
    step = partial(job.step, peer)

    def call() -> None:
        results.append(job.call(peer))

    few_s = 1e-3 * clock.ms(partial(job.step, peer, ROWS))
    if not peer.slow_start and (expected_s := expected_step_s(job, peer, clock, few_s)) > LONGEST_S:
        raise CannotRun(f"not measured: about {expected_s:.0f} s a step, going by a few rows")
    job.drop_gradients()
    first_ms = clock.ms(call)
    whole, alone = results.pop(), job.call(peer, ROWS)
    if not peer.judged:
        pass
    elif whole.dim():
        if alone.shape != whole.shape:
            found["batch_invariant"] = torch.equal(alone, whole[: len(alone)])
        found["max_error"] = rounded((whole[: len(job.truth)].double() - job.truth).abs().max())
    elif job.truth.dim():  # a sum alone
        found["max_error"] = rounded((alone.double() - job.truth.sum()).abs() / ROWS)
    else:
        found["max_error"] = rounded((alone.double() - job.truth).abs())
    del whole, alone
    job.drop_gradients()
    found["first_s"] = round(few_s + (first_ms + clock.ms(step)) / 1e3, 2)
    if peer.name == "triton":
        found["tuner"] = tuner_choices(job.op)
    if peer.judged and job.true_gradient is not None:
        gradient = job.leaves[0].grad
        assert gradient is not None
        difference = gradient[: len(job.true_gradient)].double() - job.true_gradient
        found["hidden_gradient_error"] = rounded(difference.norm() / job.true_gradient.norm())
    job.drop_gradients()
    if clock.cuda:
        found["peak_total_mib"] = clock.peak_mib(step, sum(leaf.nbytes for leaf in job.leaves))
        job.drop_gradients()
        if not peer.sums:
            found["peak_forward_mib"] = clock.peak_mib(call)
            results.clear()
    return found


def expected_step_s(job: Measurable, peer: Peer, clock: Clock, few_s: float) -> float:
    """Of all rows. In proportion to the first `few_s` of ROWS rows, if that is short enough; else by how much more
    twice the rows take, as there is a part that they share, such as writing the gradient of the head."""
    times = 1 / job.share(ROWS)
    if few_s * times <= LONGEST_S or few_s > LONGEST_S:
        return few_s * times
    few_s, more_s = (1e-3 * clock.ms(partial(job.step, peer, rows)) for rows in (ROWS, 2 * ROWS))
    job.drop_gradients()
    return few_s + (more_s - few_s) * (times - 1)


def tuner_choices(op: str) -> dict[str, str]:
    """What Triton's tuner took for the kernels of an op that ran last."""
    if op == "linear_kl":
        from rlhf_kernels.kl import triton_kernels as kl

        kernels = (kl.fold_kl, kl.differentiate_kl)
    else:
        from rlhf_kernels.logprob import triton_kernels as logprob

        kernels = (logprob.fold, logprob.differentiate)
    return {kernel.base_fn.__name__: str(kernel.best_config) for kernel in kernels if hasattr(kernel, "best_config")}


def fresh_peaks(job: Measurable, peer: Peer) -> dict:
    """Peaks on CPU, each of a process of its own."""
    question = json.dumps({"job": job.arguments(), "peer": peer.name})
    command = [sys.executable, "-m", "benchmarks.harness.peak_memory"]
    done = subprocess.run(command, cwd=ROOT, input=question, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer.name}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(times_ms: list[float]) -> dict:
    median = statistics.median(times_ms)
    return {"median": round(median, 4), "min": round(min(times_ms), 4), "max": round(max(times_ms), 4)}


class Pace(Protocol):
    """Repeats turns of all runs: `others()` and `native()` make one turn."""

    def __call__(self, native: Callable[[], None], others: Callable[[], None], rounds: int) -> None: ...


def in_a_loop(native: Callable[[], None], others: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        others()
        native()


class Turns:
    """Times of all runs, one after the other, native last, turn by turn; with the budgets of `peers`, by name."""

    def __init__(self, job: Measurable, clock: Clock, runs: dict[str, tuple], peers: dict[str, Peer]) -> None:
        self.job, self.clock, self.runs, self.peers = job, clock, runs, peers
        self.failed: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        self.times_ms: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in self.runs}

    def take(self, name: str) -> None:
        peer = self.peers.get(name)
        with budget_of(peer) if peer else nullcontext():
            if peer and peer.budget_mib is not None:
                self.attempt(name, self.runs[name][1])  # not counted: in training, a step finds what the last one left
            for kept, run in zip(self.times_ms[name], self.runs[name], strict=True):
                if (ms := self.attempt(name, run)) is not None:
                    kept.append(ms)

    def attempt(self, name: str, run: Callable[[], object] | None) -> float | None:
        if run is None or name in self.failed:
            return None
        try:
            return self.clock.ms(run)
        except Exception as error:
            self.failed[name] = reason_of(error)
            return None
        finally:
            self.job.drop_gradients()

    def measure(self, expected_s: float, seconds: float, most_rounds: int, pace: Pace) -> int:
        """How many rounds, between two and `most_rounds`, `seconds` were enough for. On a GPU the first turn does not
        count: it fetches memory."""
        native = "native" if "native" in self.runs else next(iter(self.runs))
        names = [name for name in self.runs if name != native]
        order = random.Random(0)  # drawn anew each turn, or one would always find the caches as the same one left them

        def others() -> None:
            for name in order.sample(names, len(names)):
                self.take(name)

        turn_s = expected_s
        if self.clock.cuda and most_rounds > 1:
            start = time.perf_counter()
            others()
            self.take(native)
            turn_s = time.perf_counter() - start
            self.clear()
        rounds = most_rounds if turn_s * most_rounds <= seconds else max(min(2, most_rounds), int(seconds / turn_s))
        pace(lambda: self.take(native), others, rounds)
        return rounds


def measure(
    job: Measurable,
    clock: Clock,
    *,
    seconds: float,
    most_rounds: int,
    may_start: Callable[[Peer], bool] = lambda peer: True,
    targets: dict[str, dict] | None = None,
    peaks: bool = False,
    pace: Pace = in_a_loop,
) -> Iterator[dict]:
    """Rows of one job. `seconds` of turns; `peaks`: memory on CPU too; `targets` by contender: of forward, total."""
    job.make()
    able: dict[str, tuple[Peer, dict]] = {}
    bare = job.bare_gemms()
    runs: dict[str, tuple] = {} if bare is None else {"bare GEMMs": bare}
    for peer in job.peers:
        row = job.label() | {"contender": peer.name, "note": peer.note, "status": "measured"}
        if not may_start(peer):
            yield row | {"status": "not measured: time"}
            continue
        try:
            if refused := peer.why_not(job.needs()):
                raise CannotRun(refused)
            with budget_of(peer):
                able[peer.name] = peer, row | try_out(job, peer, clock)
        except Exception as error:
            refused = reason_of(error)
        else:
            runs[peer.name] = runs_of(job, peer)
            clock.free()  # what it kept for itself is not the next one's lack
            continue
        job.drop_gradients()  # the error, which held the frames that hold tensors, is gone
        clock.free()
        yield row | {"status": refused}

    turns = Turns(job, clock, runs, {name: peer for name, (peer, _) in able.items()})
    expected_s = sum(row["first_s"] for peer, row in able.values() if not peer.slow_start)  # theirs is compilation
    rounds = turns.measure(expected_s, seconds, most_rounds, pace)
    if "bare GEMMs" in turns.failed:  # nothing to compare with; most likely the device itself is gone
        raise CannotRun(f"bare GEMMs: {turns.failed['bare GEMMs']}")
    rows = {name: row for name, (_, row) in able.items() if name not in turns.failed}
    if peaks and not clock.cuda:
        with ThreadPoolExecutor(2) as pool:
            asked = {name: pool.submit(fresh_peaks, job, able[name][0]) for name in rows}
            for name, answer in asked.items():
                rows[name] |= answer.result()
    if bare is not None:
        rows = {"bare GEMMs": job.label() | {"contender": "bare GEMMs", "status": "measured"}} | rows
    yield from (able[name][1] | {"status": said} for name, said in turns.failed.items())
    yield from judged(job, rows, turns.times_ms, rounds, targets or {})


def judged(job: Measurable, rows: dict[str, dict], times_ms: dict, rounds: int, targets: dict) -> Iterator[dict]:
    """`rows` with their times, and what these are to the bare GEMMs' and to the native backend's."""
    flops = 2 * job.n * job.d * job.v
    products = (job.forward_products, job.total_products)
    bare_ms = [statistics.median(kept) for kept in times_ms.get("bare GEMMs", [])]
    native_ms = [statistics.median(kept) for kept in times_ms["native"]] if "native" in rows else []
    for name, row in rows.items():
        medians_ms = [statistics.median(kept) if kept else None for kept in times_ms[name]]
        row["rounds"] = rounds
        part = 1.0 if name == "bare GEMMs" else job.counted / job.n  # masked rows need no product
        for k, what in enumerate(("forward", "total")):
            if medians_ms[k] is None:
                continue
            row[f"{what}_ms"] = spread(times_ms[name][k])
            if bare_ms:
                row[f"gemm_fraction_{what}"] = round(part * bare_ms[k] / medians_ms[k], 4)
        if name == "bare GEMMs":
            row["tflops"] = [round(1e-9 * flops * k / ms, 3) for k, ms in zip(products, bare_ms, strict=True)]
        if None not in medians_ms:
            row["backward_ms"] = round(medians_ms[1] - medians_ms[0], 4)
        if native_ms and name != "native":
            ratios = zip(("forward", "total"), medians_ms, native_ms, strict=True)
            row["over_native"] = {what: round(ms / ours, 4) for what, ms, ours in ratios if ms is not None}
        if name in targets:
            row["targets"] = targets[name]
        yield row


def rates_of(clock: Clock, dtype: torch.dtype, size: int, copy_mib: int) -> dict:
    """The most that this device does: products of a large GEMM, and a copy's bytes, read and written."""
    a, b, c = (normal(size, size, seed=k, dtype=dtype, device=clock.device) for k in range(3))
    source = torch.zeros(copy_mib << 20, dtype=torch.uint8, device=clock.device)
    target = torch.zeros_like(source)
    gemm, copy = partial(torch.mm, a, b, out=c), partial(target.copy_, source)
    times: dict[str, list[float]] = {"gemm": [], "copy": []}
    for turn in range(13):
        for name, run in (("gemm", gemm), ("copy", copy)):
            ms = clock.ms(run)
            if turn > 2:
                times[name].append(ms)
    return {
        "gemm": {"n": size, "dtype": str(dtype).removeprefix("torch."), "ms": spread(times["gemm"])}
        | {"tflops": round(2e-9 * size**3 / statistics.median(times["gemm"]), 3)},
        "copy": {"mib": copy_mib, "ms": spread(times["copy"])}
        | {"gb_per_s": round(2e-6 * source.nbytes / statistics.median(times["copy"]), 1)},
    }
