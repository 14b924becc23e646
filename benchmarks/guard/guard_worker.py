"""One side of `benchmarks/guard/guard.py`: a process that imports one folder's rlhf_kernels and does what it is told.

    PYTHONPATH=FOLDER python -P guard_worker.py [--tiny]

A line in is JSON, [command, case name]; a line out is its answer. "make" makes inputs from fixed seeds and runs the
case twice; "time" answers the seconds of one run: of processor time with one thread, so that others' work on this
machine counts less, and by the clock with more, as then waiting for each other is a part of it; "count" answers the
instructions of one run, by the processor's own counter. {"cannot": why} is an answer too. Only public names are used,
and only when a case runs: both sides run this file, and one of them may be an older commit.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

# Short runs, tens of milliseconds at most: the fewer of them others interrupt, the more can be paired. Narrow ones: in
# wide ones nearly all the time is torch's GEMM.
FULL = {"rows": 128, "width": 256, "vocab": 4096, "small": 512, "repeat": 30}
TINY = {"rows": 32, "width": 64, "vocab": 1024, "small": 64, "repeat": 10}  # for counting under valgrind, and for tests
SYSCALL = {"x86_64": 298, "aarch64": 241}  # perf_event_open


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Head:
    """hidden [rows, width], weight [vocab, width], targets [rows], and a reference's hidden and weight."""

    def __init__(self, dtype: torch.dtype, sizes: dict[str, int], masked: float = 0.0) -> None:
        n, d, v = sizes["rows"], sizes["width"], sizes["vocab"]
        self.hidden = randn(n, d, seed=1).to(dtype).requires_grad_()
        self.weight = (randn(v, d, seed=2) * d**-0.5).to(dtype).requires_grad_()
        self.ref_hidden = (self.hidden.detach().float() + 0.1 * randn(n, d, seed=3)).to(dtype)
        self.ref_weight = self.weight.detach().clone()
        self.targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(4))
        self.targets[torch.rand(n, generator=torch.Generator().manual_seed(5)) < masked] = -100

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


Sizes = dict[str, int]
CASES: dict[str, Callable[[Sizes], Callable[[], object]]] = {}


def logprobs(dtype: torch.dtype, backward: bool, masked: float = 0.0, outputs: tuple[str, ...] = ()) -> Callable:
    def make(sizes: Sizes) -> Callable[[], object]:
        head = Head(dtype, sizes, masked)

        def run() -> None:
            head.drop_gradients()
            with torch.set_grad_enabled(backward):
                found = rk.linear_logprobs(head.hidden, head.weight, head.targets, outputs=outputs)
                total = found.logprobs.sum() + (found.entropy.sum() if "entropy" in outputs else 0)
            if backward:
                total.backward()

        return run

    return make


def kl(dtype: torch.dtype, backward: bool) -> Callable:
    def make(sizes: Sizes) -> Callable[[], object]:
        head = Head(dtype, sizes)

        def run() -> None:
            head.drop_gradients()
            with torch.set_grad_enabled(backward):
                total = rk.linear_kl(head.hidden, head.weight, head.ref_hidden, head.ref_weight).sum()
            if backward:
                total.backward()

        return run

    return make


def linear_dpo(sizes: Sizes) -> Callable[[], object]:
    head = Head(torch.float32, sizes)
    pairs = (4, sizes["rows"] // 4)
    reference = {"ref_hidden": head.ref_hidden.view(*pairs, -1), "ref_weight": head.ref_weight}

    def run() -> None:
        head.drop_gradients()
        found = rk.linear_dpo_loss(head.hidden.view(*pairs, -1), head.weight, head.targets.view(pairs), **reference)
        found.loss.backward()

    return run


def small(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """A loss of two small tensors, forward and backward, often enough to be timed."""

    def make(sizes: Sizes) -> Callable[[], object]:
        ours, theirs = randn(sizes["small"], seed=1).requires_grad_(), randn(sizes["small"], seed=2)

        def run() -> None:
            for _ in range(sizes["repeat"]):
                ours.grad = None
                loss(ours, theirs).sum().backward()

        return run

    return make


def dpo(ours: Tensor, theirs: Tensor) -> Tensor:
    chosen, rejected = torch.arange(len(ours)).chunk(2)
    return rk.dpo_loss(ours, theirs, chosen, rejected).losses


FP32, BF16 = torch.float32, torch.bfloat16
CASES |= {
    "log-probs fp32, forward": logprobs(FP32, False),
    "log-probs fp32, total": logprobs(FP32, True),
    "log-probs bf16, forward": logprobs(BF16, False),
    "log-probs bf16, total": logprobs(BF16, True),
    "log-probs and entropy fp32, total": logprobs(FP32, True, outputs=("entropy",)),
    "log-probs fp32, half masked, total": logprobs(FP32, True, masked=0.5),
    "KL fp32, forward": kl(FP32, False),
    "KL fp32, total": kl(FP32, True),
    "linear DPO fp32, with reference, total": linear_dpo,
    "DPO of log-probs, total": small(dpo),
    "Bradley-Terry, total": small(lambda ours, theirs: rk.bradley_terry_loss(ours, theirs)),
    "KL penalty k3, total": small(lambda ours, theirs: rk.kl_penalty(ours, theirs, "k3")),
}


def open_counter() -> int:
    """A file whose 8 bytes are the instructions that this thread has run in user space, what `perf stat` reads too."""
    if platform.system() != "Linux" or platform.machine() not in SYSCALL:
        raise OSError(f"no processor counters on {platform.system()} {platform.machine()}")
    leave_out_the_kernel = 1 << 5 | 1 << 6
    attributes = struct.pack("IIQQQQQ", 0, 64, 1, 0, 0, 0, leave_out_the_kernel).ljust(
        64, b"\0"
    )  # hardware, instructions
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(SYSCALL[platform.machine()], attributes, 0, -1, -1, 0)  # this thread, any core, no group
    if file < 0:
        raise OSError(f"no processor counter for instructions ({os.strerror(ctypes.get_errno())})")
    return file


def instructions_of(run: Callable[[], object]) -> int:
    file = open_counter()
    try:
        before = os.read(file, 8)
        run()
        after = os.read(file, 8)
    finally:
        os.close(file)
    return int.from_bytes(after, sys.byteorder) - int.from_bytes(before, sys.byteorder)


def answer(command: str, name: str, made: dict[str, Callable[[], object]], sizes: Sizes) -> dict:
    if command == "make":
        made.clear()  # one case's tensors at a time
        made[name] = CASES[name](sizes)
        for _ in range(2):
            made[name]()
        return {"made": name}
    if command == "count":
        return {"instructions": instructions_of(made[name])}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    made[name]()
    return {"seconds": clock() - start}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever anyone prints is no answer
    sizes = TINY if "--tiny" in sys.argv else FULL
    built = rk.build_info()
    told = {"file": rk.__file__, "native": built["native"], "isa": built["cpu_isa"], "cases": list(CASES)}
    print(json.dumps(told | {"threads": torch.get_num_threads(), "torch": torch.__version__}), file=answers, flush=True)
    made: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        try:
            told = answer(*json.loads(line), made, sizes)
        except Exception as error:  # whatever an older commit, or a broken one, says: it becomes the text of a row
            told = {"cannot": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
