"""`python -m benchmarks.steps.dpo`: one trainer's DPO run on the CPU, in a process of its own, step by step.

It reads a line of JSON, the request, then one line for every step that it may take; before each step, and at its end,
it answers one line: {} or the result.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.steps.trainers import TRAINERS, Run
from benchmarks.steps.watch import Watch


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a trainer prints is no answer

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers, flush=True)

    def wait_for_turn() -> None:
        answer({})
        sys.stdin.readline()

    request = json.loads(sys.stdin.readline())
    run = Run(**request["run"] | {"folder": Path(request["run"]["folder"])})
    run.folder.mkdir()
    train = TRAINERS[request["trainer"]]()
    watch = Watch(wait_for_turn)
    losses = train(run)
    answer({"status": "measured", **watch.columns(request["warm_up"]), "losses": losses})


if __name__ == "__main__":
    main()
