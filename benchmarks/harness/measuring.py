"""How a case is measured: peers take turns in one process, and a row says what came out. The same on CPU and GPU.

Every row has at least LEAST_TURNS turns. A case has so many seconds: who would not fit into them takes no turns, and
its row says how long its one run took.
"""

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.case import ROWS, Case, Run, normal
from benchmarks.harness.peak_memory import peaks_in_fresh_process
from benchmarks.harness.peers import OURS, CannotRun, Peer

LEAST_TURNS = 5
LONGEST_S = 40.0  # a step that takes longer, going by a few rows, is not waited for
BARE = "bare GEMMs"


class Clock:
    """Times, memory and out-of-memory of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def ms(self, run: Run) -> float:
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

    def peak_mib(self, run: Run, besides: int = 0) -> float:
        """The peak on a GPU. On a CPU, whose processes keep their memory, peak_memory.py takes a fresh one."""
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
    message = str(error).strip().partition("\n")[0][:160]
    return message if isinstance(error, CannotRun) else f"cannot run here: {type(error).__name__}: {message}"


def rounded(error: Tensor) -> float | str:
    return float(f"{error:.3g}") if error.isfinite() else str(error.item())  # JSON has no word for nan


def error_of(case: Case, peer: Peer, whole: Tensor, alone: Tensor) -> Tensor:
    """Largest difference from the truth: of a value a row, of a mean where a peer returns sums, or of the one loss."""
    if not case.truth.dim():
        return (alone.double() - case.truth).abs()
    if whole.dim():
        return (whole[: len(case.truth)].double() - case.truth).abs().max()
    return (alone.double() - case.truth.sum()).abs() / ROWS


def try_out(case: Case, peer: Peer, clock: Clock) -> tuple[dict, float]:
    """A peer's columns besides its times and, on CPU, its memory, and the seconds of a turn; raises what it
    raises. It is warm then."""
    columns: dict = {}
    results: list[Tensor] = []
    forward, step = case.runs(peer)

    def call() -> None:
        results.append(case.call(peer))

    if clock.cuda:  # at full size: what tunes itself does so for the size that it is measured at
        few_s = 1e-3 * clock.ms(step)
    else:
        few_s = 1e-3 * clock.ms(partial(case.step, peer, ROWS))
        if not peer.slow_start and (expected_s := few_s / case.share(ROWS)) > LONGEST_S:
            raise CannotRun(f"too slow to take turns: about {expected_s:.0f} s a step, going by a few rows")
    case.drop_gradients()
    first_ms = clock.ms(call)
    whole, alone = results.pop(), case.call(peer, ROWS)
    if peer.judged:
        columns["max_error"] = rounded(error_of(case, peer, whole, alone))
        if whole.dim() and alone.shape != whole.shape:
            columns["batch_invariant"] = torch.equal(alone, whole[: len(alone)])
    del whole, alone
    case.drop_gradients()
    step_ms = clock.ms(step)
    columns["first_s"] = round(few_s + (first_ms + step_ms) / 1e3, 2)
    if peer.name == "triton":
        columns["tuner"] = tuner_choices(case.op)
    if peer.judged and case.true_gradient is not None:
        gradient = case.leaves[0].grad
        assert gradient is not None
        difference = gradient[: len(case.true_gradient)].double() - case.true_gradient
        columns["hidden_gradient_error"] = rounded(difference.norm() / case.true_gradient.norm())
    case.drop_gradients()
    if peer.slow_start or clock.cuda:  # the first ones had compilation in them
        first_ms, step_ms = clock.ms(call) if forward else 0.0, clock.ms(step)
        case.drop_gradients()
    if clock.cuda:
        columns["peak_total_mib"] = clock.peak_mib(step, sum(leaf.nbytes for leaf in case.leaves))
        case.drop_gradients()
        if forward:
            columns["peak_forward_mib"] = clock.peak_mib(call)
    results.clear()
    steps = 1 if peer.budget_mib is None else 2  # with a budget of its own a turn has a step that is not counted
    return columns, 1e-3 * ((first_ms if forward else 0.0) + steps * step_ms)


def tuner_choices(op: str) -> dict[str, str]:
    """The choices of Triton's tuner for the kernels of an op that ran last."""
    if op == "linear_kl":
        from rlhf_kernels.kl import triton_kernels as kl

        kernels = (kl.fold_kl, kl.differentiate_kl)
    else:
        from rlhf_kernels.logprob import triton_kernels as logprob

        kernels = (logprob.fold, logprob.differentiate)
    return {kernel.base_fn.__name__: str(kernel.best_config) for kernel in kernels if hasattr(kernel, "best_config")}


def spread(times_ms: list[float]) -> dict:
    median = statistics.median(times_ms)
    return {"median": round(median, 4), "min": round(min(times_ms), 4), "max": round(max(times_ms), 4)}


@dataclass(eq=False)
class Contender:
    """One that takes turns: a peer, or the bare GEMMs."""

    name: str
    runs: tuple[Run | None, Run]
    peer: Peer | None
    row: dict
    turn_s: float
    failed: str = ""
    times_ms: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def take_turn(self, case: Case, clock: Clock) -> None:
        """Forward, then forward and backward. After an error it takes no more."""
        if self.failed:
            return
        with self.peer.budget() if self.peer else nullcontext():
            try:
                if self.peer and self.peer.budget_mib is not None:
                    self.runs[1]()  # not counted: in training, a step finds what the last one left
                    case.drop_gradients()
                for times_ms, run in zip(self.times_ms, self.runs, strict=True):
                    if run is not None:
                        times_ms.append(clock.ms(run))
                        case.drop_gradients()
            except Exception as error:
                self.failed = reason_of(error)
        if self.failed:
            case.drop_gradients()  # the error, which held the frames that hold tensors, is gone

    def median_ms(self, k: int) -> float | None:
        return statistics.median(self.times_ms[k]) if self.times_ms[k] else None


Pace = Callable[[Callable[[], None], Callable[[], None], int], None]


def in_a_loop(leader: Callable[[], None], others: Callable[[], None], turns: int) -> None:
    """The pace of a plain loop. pytest-benchmark's is `pedantic(leader, setup=others, rounds=turns)`."""
    for _ in range(turns):
        others()
        leader()


def admit(contenders: list[Contender], needed: tuple[str, ...], seconds: float, turns: int) -> list[Contender]:
    """Those for whose turns there is time: who is needed always, then the fastest first."""
    able = [one for one in contenders if one.name in needed]
    for one in sorted(contenders, key=lambda one: one.turn_s):
        if one not in able and turns * sum(other.turn_s for other in [*able, one]) <= seconds:
            able.append(one)
    return able


def measure(
    case: Case,
    clock: Clock,
    *,
    seconds: float,
    most_turns: int,
    may_start: Callable[[Peer], bool] = lambda peer: True,
    targets: dict[str, dict] | None = None,
    peaks_s: float = 0.0,
    pace: Pace = in_a_loop,
) -> Iterator[dict]:
    """Rows of one case, with `seconds` for turns and, on a CPU, `peaks_s` for peak memory. A peer that may not start is
    not tried out. `targets` by contender: of forward, total."""
    case.make()
    contenders: list[Contender] = []
    if bare := case.bare_gemms():
        row = case.label() | {"contender": BARE, "status": "measured"}
        contenders.append(Contender(BARE, bare, None, row, 1e-3 * sum(map(clock.ms, bare))))
    for peer in case.peers:
        row = case.label() | {"contender": peer.name, "note": peer.note, "status": "measured"}
        try:
            if refused := peer.why_not(case.needs()):
                raise CannotRun(refused)
            if not may_start(peer):
                raise CannotRun("not measured: time")
            with peer.budget():
                columns, turn_s = try_out(case, peer, clock)
        except Exception as error:
            refused = reason_of(error)
        else:
            contenders.append(Contender(peer.name, case.runs(peer), peer, row | columns, turn_s))
            clock.free()  # what it kept for itself is not the next one's lack
            continue
        case.drop_gradients()  # the error, which held the frames that hold tensors, is gone
        clock.free()
        yield row | {"status": refused}

    least = min(LEAST_TURNS, most_turns)
    able = admit(contenders, (BARE, *OURS, *(targets or {})), seconds, least)
    for one in (one for one in contenders if one not in able):
        yield one.row | {"status": f"too slow to take turns: {one.turn_s:.1f} s forward and total, from one run"}
    turns = max(least, min(most_turns, int(seconds / max(1e-9, sum(one.turn_s for one in able)))))
    take_turns(case, clock, able, turns, pace)
    if bare and able[0].failed:  # nothing to compare with; most likely the device itself is gone
        raise CannotRun(f"{BARE}: {able[0].failed}")
    if peaks_s and not clock.cuda:
        measure_peaks(case, [one for one in able if one.peer and not one.failed], peaks_s)
    yield from (one.row | {"status": one.failed} for one in able if one.failed)
    yield from rows_of(case, [one for one in able if not one.failed], turns, targets or {})


def take_turns(case: Case, clock: Clock, contenders: list[Contender], turns: int, pace: Pace = in_a_loop) -> None:
    """All contenders once a turn, in an order that is drawn anew for each: or one would always find the caches as the
    same other one left them. `pace` takes the turn of native, or else of the last one, after the turns of those that
    stand before it and of those that stood behind it the time before. On a GPU a first turn does not count: it fetches
    memory."""
    if clock.cuda and turns > 1:
        for one in contenders:
            one.take_turn(case, clock)
            one.times_ms = ([], [])
    leader = next((one for one in contenders if one.name == "native"), contenders[-1])
    order, behind = random.Random(0), []

    def others() -> None:
        drawn = order.sample(contenders, len(contenders))
        place = drawn.index(leader)
        for one in (*behind, *drawn[:place]):
            one.take_turn(case, clock)
        behind[:] = drawn[place + 1 :]

    pace(lambda: leader.take_turn(case, clock), others, turns)
    for one in behind:
        one.take_turn(case, clock)


def measure_peaks(case: Case, contenders: list[Contender], seconds: float) -> None:
    """Two at a time, this project's first; none is started after `seconds`."""
    started = time.perf_counter()

    def measure_one(one: Contender) -> dict:
        return peaks_in_fresh_process(case, one.peer) if time.perf_counter() - started < seconds else {}

    with ThreadPoolExecutor(2) as pool:
        for one, columns in zip(contenders, pool.map(measure_one, contenders), strict=True):
            one.row |= columns


def rows_of(case: Case, able: list[Contender], turns: int, targets: dict) -> Iterator[dict]:
    """Rows with their times, and what these are to the bare GEMMs' and to the native backend's."""
    bare, native = (next((one for one in able if one.name == name), None) for name in (BARE, "native"))
    products = case.products
    for one in able:
        row = one.row | {"rounds": turns}
        part = 1.0 if one is bare else case.counted_share  # masked rows need no product
        over_native = {}
        for k, what in enumerate(("forward", "total")):
            if (ms := one.median_ms(k)) is None:
                continue
            row[f"{what}_ms"] = spread(one.times_ms[k])
            if bare:
                row[f"gemm_fraction_{what}"] = round(part * bare.median_ms(k) / ms, 4)
            if native and one is not native:
                over_native[what] = round(ms / native.median_ms(k), 4)
        if one is bare:
            flops = 2 * case.n * case.d * case.v
            row["tflops"] = [round(1e-9 * flops * n / one.median_ms(k), 3) for k, n in enumerate(products)]
        if over_native:
            row["over_native"] = over_native
        if one.name in targets:
            row["targets"] = targets[one.name]
        yield row


def rates_of(clock: Clock, dtype: torch.dtype, size: int, copy_mib: int) -> dict:
    """The most that this device does: products of a large GEMM, and a copy's bytes, read and written."""
    a, b, c = (normal(size, size, seed=k, dtype=dtype, device=clock.device) for k in range(3))
    source = torch.zeros(copy_mib << 20, dtype=torch.uint8, device=clock.device)
    target = torch.zeros_like(source)
    runs = (partial(torch.mm, a, b, out=c), partial(target.copy_, source))
    gemm, copy = ([clock.ms(run) for _ in range(13)][3:] for run in runs)
    tflops, gb_per_s = 2e-9 * size**3 / statistics.median(gemm), 2e-6 * source.nbytes / statistics.median(copy)
    gemm_size = {"n": size, "dtype": str(dtype).removeprefix("torch."), "ms": spread(gemm)}
    copy_size = {"mib": copy_mib, "ms": spread(copy)}
    return {"gemm": gemm_size | {"tflops": round(tflops, 3)}, "copy": copy_size | {"gb_per_s": round(gb_per_s, 1)}}
