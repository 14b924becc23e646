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

START_SECONDS = 120.0  # sympy is large


class ChildProcess:
    """A program that says "ready", then has a line for each line of JSON: started when it is needed."""

    def __init__(self, program: str) -> None:
        self.program = Path(__file__).with_name(program)
        self.process: subprocess.Popen[str] | None = None
        self.lock = Lock()
        atexit.register(self.stop)

    def reply(self, question: Any, seconds: float) -> str:
        """The program's answer; nothing where it has none after so many seconds, or ends."""
        with self.lock:
            if self.process is None:
                command, pipe = [sys.executable, "-P", str(self.program)], subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                if not self.receive(START_SECONDS):
                    return ""
            with suppress(BrokenPipeError):  # it has ended since
                print(json.dumps(question), file=self.process.stdin, flush=True)
            return self.receive(seconds)

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
