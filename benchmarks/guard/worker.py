"""One side of `python -m benchmarks.guard`: a process that runs cases with one folder's rlhf_kernels.

    PYTHONPATH=FOLDER:ROOT python -P -m benchmarks.guard.worker [--tiny]

A line in is JSON, [command, case name]; a line out is its answer. "make" makes inputs from fixed seeds and runs the
case twice; "time" answers the seconds of one run: of processor time with one thread, so that others' work on this
machine counts less, and by the clock with more, as then waiting for each other is a part of it. {"cannot": why} is an
answer too. Cases use public names only, as one side may be an older commit.
"""

import json
import os
import sys
import time

import torch

import rlhf_kernels as rk
from benchmarks.harness.case import Case, Run
from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.pair_losses import PairLoss
from benchmarks.harness.peers import Peer

REPEAT = 30  # of a call on a small tensor, so that it can be timed


def cases_of(tiny: bool) -> dict[str, tuple[Case, bool]]:
    """By name, a case and whether backward belongs to it. Short runs, tens of milliseconds at most: the fewer of them
    others interrupt, the more can be paired. Narrow ones: in wide ones nearly all the time is torch's GEMM. `tiny`:
    for counting under valgrind, and for tests."""
    n, d, v, s = (32, 64, 1024, 64) if tiny else (128, 256, 4096, 512)
    bf16 = {"dtype": torch.bfloat16}
    return {
        "log-probs fp32, forward": (LinearLogprobs(n, d, v), False),
        "log-probs fp32, total": (LinearLogprobs(n, d, v), True),
        "log-probs bf16, forward": (LinearLogprobs(n, d, v, **bf16), False),
        "log-probs bf16, total": (LinearLogprobs(n, d, v, **bf16), True),
        "log-probs fp32, half masked, total": (LinearLogprobs(n, d, v, masked=0.5), True),
        "KL fp32, forward": (LinearKL(n, d, v), False),
        "KL fp32, total": (LinearKL(n, d, v), True),
        "linear DPO fp32, with reference, total": (LinearDPO(n, d, v), True),
        "DPO of log-probs, total": (PairLoss("dpo_loss", s), True),
        "Bradley-Terry, total": (PairLoss("bradley_terry_loss", s), True),
        "KL penalty k3, total": (PairLoss("kl_penalty", s), True),
    }


def run_of(case: Case, backward: bool) -> Run:
    """Our way, on inputs that are made now."""
    case.make_inputs()
    peer = Peer("auto", case.ours("auto"))

    def run() -> None:
        for _ in range(REPEAT if isinstance(case, PairLoss) else 1):
            if backward:
                case.drop_gradients()
                case.step(peer)
            else:
                case.call(peer)

    return run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever anyone prints is no answer
    cases, build = cases_of("--tiny" in sys.argv), rk.build_info()
    facts = {"file": rk.__file__, "native": build["native"], "isa": build["cpu_isa"], "cases": list(cases)}
    print(
        json.dumps(facts | {"threads": torch.get_num_threads(), "torch": torch.__version__}), file=answers, flush=True
    )
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run: Run = list  # one case's tensors at a time
    for line in sys.stdin:
        command, name = json.loads(line)
        try:
            if command == "make":
                run = run_of(*cases[name])
                run()
            start = clock()
            run()
            answer = {"seconds": clock() - start}
        except Exception as error:  # whatever an older commit, or a broken one, says: it becomes the text of a row
            answer = {"cannot": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
