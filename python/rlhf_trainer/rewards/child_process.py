"""Work on what a model wrote, in a process of its own that is ended where it takes long: what a completion holds may
take for ever, and no signal ends Python while it computes a power or searches for a pattern."""

import atexit
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from typing import Any

PROGRAM = str(Path(__file__).with_name("check_child.py"))
START_SECONDS = 120.0  # sympy is large


class ChildProcess:
    """A process with one of the checks of check_child.py, started when it is needed."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.process: subprocess.Popen[str] | None = None
        self.lock = Lock()
        atexit.register(self.stop)

    def holds(self, *values: Any, seconds: float) -> bool:
        """Whether the check holds of the values; not where it takes longer than `seconds`, or ends the process."""
        with self.lock:
            if self.process is None:
                command, pipe = [sys.executable, "-P", PROGRAM, self.check], subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                if not self.receive(START_SECONDS):
                    return False
            with suppress(BrokenPipeError):  # it has ended since
                print(json.dumps(values), file=self.process.stdin, flush=True)
            return self.receive(seconds) == "yes"

    def receive(self, seconds: float) -> str:
        timer = Timer(seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline().strip()
        timer.cancel()
        if not line:
            self.stop()
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
