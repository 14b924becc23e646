"""What growth breaks at on this machine: caches, what a new page and a call cost, page faults of calls.

`python -m benchmarks.scaling.growth --evidence benchmarks/results/evidence-NAME.json` writes it.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

CONTENDERS = ("native", "eager")


def cost_of(run: Callable[[], object], calls: int = 3) -> dict:
    """Of one call: page faults, and processor time in program and system, to which other load does not add."""
    run(), run()  # libraries, and what the allocator keeps
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(calls):
        run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "faults": (after.ru_minflt - before.ru_minflt) // calls,
        "program_ms": round(1e3 * (after.ru_utime - before.ru_utime) / calls, 1),
        "system_ms": round(1e3 * (after.ru_stime - before.ru_stime) / calls, 1),
    }


def least_s(run: Callable[[], object], turns: int = 7) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_evidence(path: Path) -> None:
    """What a law breaks at: caches, what a new page costs, faults of a call, what a call costs at least."""
    import torch

    import rlhf_kernels as rk
    from benchmarks.harness.record import cpu_name

    torch.set_num_threads(1)
    page = resource.getpagesize()
    old, source = torch.empty(64 << 20, dtype=torch.uint8), torch.ones(64 << 20, dtype=torch.uint8)
    new_s = least_s(lambda: torch.empty_like(source).fill_(1))
    old_s, copy_s = least_s(lambda: old.fill_(1)), least_s(lambda: old.copy_(source))

    def step(contender: str, n: int, d: int, v: int) -> tuple[Callable[[], object], Callable[[], object]]:
        hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d).mul_(d**-0.5).requires_grad_()
        targets = torch.arange(n) % v

        def forward() -> torch.Tensor:
            if contender == "native":
                return rk.linear_logprobs(hidden, weight, targets, backend="native").logprobs
            return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])

        def total() -> None:
            hidden.grad = weight.grad = None
            forward().sum().backward()

        return torch.no_grad()(forward), total

    calls = []
    for n, d, v in ((64, 512, 8192), (64, 512, 32768), (512, 128, 8192), (512, 128, 16384), (512, 128, 65536)):
        for contender in CONTENDERS:
            sizes = {"weight_pages": 4 * v * d // page, "logit_pages": 4 * n * v // page}
            for what, run in zip(("forward", "total"), step(contender, n, d, v), strict=True):
                calls.append({"contender": contender, "what": what, "n": n, "d": d, "v": v} | sizes | cost_of(run))
    forward, total = step("native", 1, 64, 64)
    machine = caches_kib() | {
        "page, KiB": page >> 10,
        "new memory written, GB/s": 1e-9 * source.nbytes / new_s,
        "old memory written, GB/s": 1e-9 * source.nbytes / old_s,
        "copied, read and written, GB/s": 2e-9 * source.nbytes / copy_s,
        "a new page, microseconds": 1e6 * (new_s - old_s) * page / source.nbytes,
        "native call of 1 x 64 x 64, forward, ms": 1e3 * least_s(forward, 200),
        "native call of 1 x 64 x 64, forward and backward, ms": 1e3 * least_s(total, 200),
    }
    device = {"device": cpu_name(), "cpu_isa": rk.build_info()["cpu_isa"]}
    found = {"device": device, "measured": time.strftime("%Y-%m-%d", time.gmtime())}
    found |= {"machine": {what: rounded(value) for what, value in machine.items()}, "calls": calls}
    path.write_text(json.dumps(found, indent=1) + "\n")


def rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.3g}")


def caches_kib() -> dict[str, int]:
    """That the first core sees. (getconf gives the last cache of the whole socket.)"""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level} cache, KiB"] = int(size.removesuffix("K"))
    return found
