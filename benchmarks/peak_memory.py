"""`python -m benchmarks.peak_memory fused|eager|TRL bfloat16|float32`: peak extra MiB of a step besides its gradients.

A process of its own, because a process keeps memory that it once had. Linux only: it reads, and resets, VmHWM.
"""

import ctypes
import sys

import torch

from benchmarks.peers import Case, totals


def status_mib(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    what, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    totals(Case(dtype, n=128, v=4096))[what]()  # loads libraries, starts threads
    case = Case(dtype)
    step = totals(case)[what]
    gradients_mib = (case.hidden.nbytes + case.weight.nbytes) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what the step needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark starts over from what is resident now
    before = status_mib("VmRSS")
    step()
    print(status_mib("VmHWM") - before - gradients_mib)


if __name__ == "__main__":
    main()
