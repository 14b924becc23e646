"""`python -m benchmarks.harness.peak_memory`, a job and a peer as JSON on stdin: their peak extra memory as JSON.

A process of its own, because a process keeps memory that it once had. Linux only: it reads, and resets, VmHWM.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness.jobs import Job, job_of
from benchmarks.harness.measuring import budget_of, runs_of
from benchmarks.harness.peers import Peer


def status_mib(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_mib(run: Callable[[], object]) -> float:
    """The most that the process holds during `run` beyond what it held before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what the run needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark starts over from what is resident now
    before = status_mib("VmRSS")
    run()
    return status_mib("VmHWM") - before


def peer_of(job: Job, name: str) -> Peer:
    return next(peer for peer in job.choose_peers() if peer.name == name)


def main() -> None:
    question = json.load(sys.stdin)
    job = job_of(question["job"])
    if job.threads:
        torch.set_num_threads(job.threads)
    with budget_of(peer_of(job, question["peer"])):
        found = peaks_of(job, question["peer"])
    print(json.dumps(found))


def peaks_of(job: Job, name: str) -> dict:
    pairs = {"sequences": (job.sequences[0], 2)} if job.sequences else {}
    small = replace(job, n=job.sequences[0] * 2 if job.sequences else 16, d=64, v=4096, **pairs)
    small.make_inputs()
    for run in runs_of(small, peer_of(small, name)):
        if run is not None:
            run()  # loads libraries, starts threads
    job.make_inputs()
    peer = peer_of(job, name)
    if peer.slow_start:  # a compiler's memory is not the step's
        for run in runs_of(job, peer):
            if run is not None:
                run()
        job.drop_gradients()
    forward, total = runs_of(job, peer)
    found = {} if forward is None else {"peak_forward_mib": round(peak_mib(forward), 1)}
    gradients_mib = sum(leaf.nbytes for leaf in job.leaves) / 2**20
    return found | {"peak_total_mib": round(peak_mib(total) - gradients_mib, 1)}


if __name__ == "__main__":
    main()
