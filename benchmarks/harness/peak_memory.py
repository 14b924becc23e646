"""`python -m benchmarks.harness.peak_memory`, a pickled case and a peer's name on stdin: its peak extra memory as JSON.

A process of its own, because a process keeps memory that it once had. Linux only: it reads, and resets, VmHWM.
"""

import ctypes
import json
import pickle
import subprocess
import sys
from dataclasses import replace

from benchmarks.harness.case import HeadCase
from benchmarks.harness.peers import ROOT, Peer


def status_mib(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def new_mark_mib() -> float:
    """The resident memory now, from where the high-water mark starts over."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what a run needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    return status_mib("VmRSS")


def peaks_in_fresh_process(case: HeadCase, peer: Peer) -> dict:
    """Peak extra MiB of forward, and of forward and backward beyond the gradients."""
    request = pickle.dumps((replace(case), peer.name))  # replace: a copy without inputs
    command = [sys.executable, "-m", "benchmarks.harness.peak_memory"]
    done = subprocess.run(command, cwd=ROOT, input=request, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer.name}: {done.stderr.decode().strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_of(case: HeadCase, peer: Peer) -> dict:
    small = replace(case, **case.small())
    for warm in [small, case] if peer.slow_start else [small]:  # a compiler's memory is not the step's
        warm.make_inputs()
        for run in filter(None, warm.runs(peer_of(warm, peer.name))):
            run()
    case.make_inputs()
    peaks = {}
    for name, run in zip(("peak_forward_mib", "peak_total_mib"), case.runs(peer), strict=True):
        if run is not None:
            before = new_mark_mib()
            run()
            gradients = [leaf.grad for leaf in case.leaves if leaf.grad is not None]
            peak = status_mib("VmHWM") - before - sum(gradient.nbytes for gradient in gradients) / 2**20
            peaks[name] = round(peak, 1)
    return peaks


def peer_of(case: HeadCase, name: str) -> Peer:
    return next(peer for peer in case.choose_peers() if peer.name == name)


def main() -> None:
    case, name = pickle.load(sys.stdin.buffer)
    peer = peer_of(case, name)
    with peer.budget():
        print(json.dumps(peaks_of(case, peer)))


if __name__ == "__main__":
    main()
