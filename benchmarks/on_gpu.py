"""`python -m benchmarks.on_gpu --out FILE`: every op on one GPU, native and in Triton, against bare GEMMs, eager torch
and other packages.

The rates of the machine come first: a large GEMM, a copy. Then, op by op and shape by shape, contenders take turns.
FILE is JSON and written after every row, so that a run that is interrupted leaves what it measured. What a contender
cannot do, or what there was no time for, has a row that says why. results/README.md says what the columns mean.

`--device cpu --tiny` runs every contender that can run on a CPU at tiny shapes: a test of this file. With
TRITON_INTERPRET=1 Triton is among them.
`--small` runs every op once, at small shapes and without rivals: made for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import rlhf_kernels as rk
from benchmarks.harness.case import HeadCase, normal
from benchmarks.harness.grpo import GRPO
from benchmarks.harness.heads import budget_that_keeps
from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.measuring import Clock, measure, rates_of, reason_of
from benchmarks.harness.peers import OURS, CannotRun, Peer
from benchmarks.harness.record import Results, environment, line_of

CASE_SECONDS, MOST_TURNS = 8.0, 9  # of turns of one case
SHAPES = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 1024, 50257)]  # N, D, V
TINY = [(72, 32, 133)]  # more rows than are judged


def excused(row: dict) -> bool:
    return row["status"] in ("measured", "not measured: time")


def cases_of(device: torch.device, tiny: bool, backends: tuple[str, ...], rivals: bool) -> Iterator[HeadCase]:
    """The most wanted first."""
    options = {"dtype": torch.bfloat16, "device": device, "backends": backends, "rivals": rivals}
    shapes, sequences = (TINY, (4, 18)) if tiny else (SHAPES, (8, 1024))
    (n, d, v), *others = shapes
    keeping = {"budgets_mib": {"larger": budget_that_keeps(n, v, device.type)}}
    yield LinearLogprobs(n, d, v, masked=0.5 if tiny else 0.0, **options, **keeping)
    for shape in others:
        yield LinearLogprobs(*shape, **options)
    small = sorted(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])
    for shape in small[:2]:
        yield LinearKL(*shape, **options)
    tokens = sequences[0] * sequences[1]
    yield LinearDPO(tokens, d, v, sequences=sequences[0], **options, **keeping)
    yield GRPO(tokens, d, v, sequences=sequences[0], **options)
    if not tiny:
        yield LinearLogprobs(n, d, v, masked=0.5, **options)
        yield LinearLogprobs(*small[0], **options | {"dtype": torch.float32})


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
        result = rk.linear_logprobs(hidden, weight, targets, bias, logit_softcap=30.0, outputs=outputs, **by)
        assert result.entropy is not None
        kl = rk.linear_kl(hidden, weight, ref_hidden, weight.detach(), targets != -100, bias=bias, **by)
        penalty = rk.kl_penalty(result.logprobs, result.logprobs.detach() - 0.1, "k3", **by)
        pairs, reference = (2, n // 2, d), {"ref_hidden": ref_hidden.view(2, n // 2, d), "ref_weight": weight.detach()}
        dpo = rk.linear_dpo_loss(hidden.view(pairs), weight, targets.view(2, -1), **reference, **by).loss
        rewards = rk.bradley_terry_loss(result.logprobs[: n // 2], result.logprobs[n // 2 :], **by)
        (result.logprobs.sum() + result.entropy.sum() + kl.sum() + penalty.sum() + dpo + rewards.sum()).backward()
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
    size, copy_mib = (256, 16) if options.tiny else (8192, 1024)
    results.content["rates"] = rates_of(clock, torch.bfloat16, size, copy_mib)
    clock.free()
    results.write()

    def may_start(peer: Peer) -> bool:
        gone = time.perf_counter() - started
        if peer.slow_start:
            return not options.tiny and gone <= options.seconds / 2
        return gone <= options.seconds

    turns = {"seconds": CASE_SECONDS, "most_turns": 1 if options.tiny else MOST_TURNS, "may_start": may_start}
    for case in cases_of(options.device, options.tiny, backends, not options.no_rivals):
        try:
            if time.perf_counter() - started > options.seconds:
                raise CannotRun("not measured: time")
            for row in measure(case, clock, **turns):
                results.add(row)
                print(line_of(row), flush=True)
        except Exception as error:  # of the inputs, the truth or the bare GEMMs; contenders' own are rows already
            results.add(case.label() | {"contender": "all", "status": reason_of(error)})
        del case
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
