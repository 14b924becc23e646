"""What became of a process that had so many seconds, and of the tests that it ran."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def how_it_ended(status):
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}" if status else "done"


def run(command, seconds, log, environment):
    """Returns "done", or how it ended. The process is asked to stop (SIGINT: pytest sums up) after nine tenths of its
    seconds, and killed after all of them, with whatever it started."""
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("w") as output:
        process, ended = subprocess.Popen(command, stdout=output, **options), ""
    try:
        process.wait(0.9 * seconds)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {0.9 * seconds:.3g} s"
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1 * seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return ended or how_it_ended(status)


def outcomes_in(log):
    """From the output of `pytest -v -rfE`, also of one that was killed before it summed up:
    {"passed": 3, "skipped": 0, "failed": 1, "failures": {test: reason}}."""
    failures = {}
    for test, reason in re.findall(
        r"\b(?:FAILED|ERROR) (tests/\S*?::\w+(?:\[.*?\])?)(?: - (.*)| *)$", log, re.MULTILINE
    ):
        failures[test] = reason[:300] or failures.get(test, "")
    counts = {word.lower(): len(re.findall(rf"\b{word} +(?:tests/|\[)", log)) for word in ("PASSED", "SKIPPED")}
    return counts | {"failed": len(failures), "failures": failures}
