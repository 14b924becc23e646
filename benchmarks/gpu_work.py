"""`python -m benchmarks.gpu_work STAGE SECONDS`: what one stage of on_gpu.py measures, into build/on_gpu/STAGE.json.

That is written after every row. `--tiny` takes the CPU, one case and tiny shapes: a test of this file.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

import rlhf_kernels as rk
from benchmarks.harness.case import HeadCase, normal
from benchmarks.harness.grpo import GRPO
from benchmarks.harness.heads import budget_that_keeps
from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.measuring import Clock, measure, rates_of, reason_of
from benchmarks.harness.peers import OURS, TRL, Peer, is_ours
from benchmarks.harness.record import PARTS, Results, environment, line_of
from tests.support import untuned

FIRST = (8192, 4096, 128256)  # N, D, V
YARDSTICK = (8192, 4096, 151936)  # published for an H100: bare GEMMs 42 ms, eager 59, Liger 192
OTHERS = [(8192, 2304, 256000), (16384, 2048, 151936), (4096, 1024, 50257)]
TINY = (72, 32, 133)  # more rows than are judged
DEFAULTS = {"dtype": torch.bfloat16, "rivals": False, "larger": False}
NATIVE = {"backends": ("native",)}
SOME = {"rivals": (TRL, "Liger", "Liger, sum", "eager")}
LIGER = {"rivals": ("Liger, sum", "Liger, scaled")}
MORE = {"rivals": (*LIGER["rivals"], "Liger", "CCE", "torch chunked", "torch chunked, sum")}
# Op, shape, and options of a stage's cases, the most wanted first. "larger": a budget that keeps the logits, besides.
CASES: dict[str, list[tuple[type[HeadCase], tuple[int, int, int], dict]]] = {
    "native": [(LinearLogprobs, at, NATIVE | {"larger": at is FIRST}) for at in (FIRST, YARDSTICK, *OTHERS)],
    "triton": [(LinearLogprobs, FIRST, {})],
    "peers": [(LinearLogprobs, shape, NATIVE | {"rivals": (TRL, "eager")}) for shape in (FIRST, YARDSTICK)],
    "more_peers": [(LinearLogprobs, FIRST, NATIVE | MORE), (LinearLogprobs, YARDSTICK, NATIVE | LIGER)],
    "masked": [(LinearLogprobs, FIRST, {"masked": 0.5, "rivals": (TRL,)})],
    "kl": [(LinearKL, OTHERS[2], SOME), (LinearKL, OTHERS[1], SOME)],
    "dpo": [(LinearDPO, FIRST, SOME | {"sequences": 8, "larger": True})],
    "grpo": [(GRPO, FIRST, SOME | {"sequences": 8})],
    "shapes": [(LinearLogprobs, shape, SOME) for shape in OTHERS],
    "fp32": [(LinearLogprobs, OTHERS[2], SOME | {"dtype": torch.float32})],
}


class Work(NamedTuple):
    results: Results
    clock: Clock
    until: float  # time.time() at which to be done
    tiny: bool

    def backends(self) -> tuple[str, ...]:
        """Those that must run: both on a GPU; elsewhere Triton where its interpreter is on."""
        return tuple(name for name in OURS if self.clock.cuda or name in rk.available_backends(self.clock.device))

    def case(self, op: type[HeadCase], shape: tuple[int, int, int], options: dict) -> HeadCase:
        shape, options = TINY if self.tiny else shape, DEFAULTS | {"backends": self.backends()} | options
        if options.pop("larger"):
            options["budgets_mib"] = {"larger": budget_that_keeps(shape[0], shape[2], self.clock.device.type)}
        return op(*shape, device=self.clock.device, **options)

    def measure(self, cases: list[tuple]) -> None:
        """Turns of a case fill half of its part of the time that is left; the rest is for warming and judging."""
        whole_s = self.until - time.time()

        def may_start(peer: Peer) -> bool:
            in_time = self.until - time.time() > 0.2 * whole_s and not (self.tiny and peer.slow_start)
            return in_time or is_ours(peer.name)

        for k, arguments in enumerate(cases):
            case, left_s = self.case(*arguments), self.until - time.time()
            turns = {"seconds": 0.5 * left_s / (len(cases) - k), "most_turns": 1 if self.tiny else 9}
            try:
                for row in measure(case, self.clock, may_start=may_start, **turns):
                    self.results.add(row)
                    print(line_of(row), flush=True)
            except Exception as error:  # of the inputs, the truth or the bare GEMMs; contenders' own are rows already
                self.results.add(case.label() | {"contender": "all", "status": reason_of(error)})
            del case
            self.clock.free()
        rows = self.results.content["rows"]  # a rival that cannot run is a finding; ours must
        if broken := [row for row in rows if row["contender"] in (*OURS, "all") and row["status"] != "measured"]:
            raise SystemExit("\n".join(map(line_of, broken)))

    def rates(self) -> None:
        """A large GEMM and a copy; then fp32 tiles of logits by bf16 products (which torch has for GPUs alone)."""
        size, copy_mib, d = (256, 16, 64) if self.tiny else (8192, 1024, FIRST[1])
        new = partial(normal, dtype=torch.float32 if self.tiny else torch.bfloat16, device=self.clock.device)
        rates = self.results.content["rates"] = rates_of(self.clock, torch.bfloat16, size, copy_mib) | {"tiles": []}
        self.results.write()
        hidden, weight = new(size, d, seed=1), new(4 * size, d, seed=2)
        options = {} if self.tiny else {"out_dtype": torch.float32}
        for rows, columns in product([size // k for k in (8, 4, 2, 1)], [size * k // 4 for k in (1, 2, 4, 8, 16)]):
            options["out"] = torch.empty(rows, columns, device=self.clock.device)
            run = partial(torch.mm, hidden[:rows], weight[:columns].T, **options)
            ms = statistics.median([self.clock.ms(run) for _ in range(9)][2:])
            tflops = round(2e-9 * rows * columns * d / ms, 3)
            rates["tiles"].append({"rows": rows, "columns": columns, "d": d, "ms": round(ms, 4), "tflops": tflops})
        self.results.write()

    def steps(self, backend: str) -> Callable[[], None]:
        """After two steps at the first shape, one more: what ncu looks at."""
        case = self.case(LinearLogprobs, FIRST, {"backends": (backend,)})
        case.make_inputs()
        (peer,) = case.choose_peers()

        def step() -> None:
            case.step(peer)
            case.drop_gradients()

        for _ in range(3):
            self.clock.ms(step)
        return step

    def kernels(self) -> None:
        """The kernels of a step of each backend, with their times."""
        of = torch.profiler.ProfilerActivity
        self.results.content["kernels"] = kernels = {}
        for name in self.backends():
            step = self.steps(name)
            with torch.profiler.profile(activities=[of.CPU if self.tiny else of.CUDA]) as profile:
                self.clock.ms(step)
            kernels[name] = [
                {"kernel": event.key[:120], "calls": event.count, "ms": 1e-3 * event.self_device_time_total}
                for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
            ]
            self.results.write()


def main() -> None:
    stage, seconds, *tiny = sys.argv[1:]
    device = torch.device("cpu" if tiny else "cuda")
    results, until = Results(PARTS / f"{stage}.json", environment(device)), time.time() + float(seconds)
    work = Work(results, Clock(device), until, bool(tiny))
    if stage in CASES:
        work.measure(CASES[stage][: 1 if tiny else None])
    elif stage.startswith("steps"):
        untuned.pytest_configure()  # or a kernel's third launch would be the tuner's
        work.steps(stage.partition("_")[2])
    else:
        getattr(work, stage)()


if __name__ == "__main__":
    main()
