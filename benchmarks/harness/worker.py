"""A process that is spoken to in lines of JSON, through its standard input and output."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any


class Ended(Exception):
    """The process has ended, or took too long and was stopped: why, with the last line of its errors."""


class Worker:
    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def send(self, message: Any) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which `receive` tells with the reason

    def receive(self, longest_s: float | None = None) -> Any:
        if not select.select([self.process.stdout], [], [], longest_s)[0]:
            self.process.kill()
            raise Ended(f"took more than {longest_s:.0f} s")
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        raise Ended(self.errors.read().strip().rpartition("\n")[2][:160] or f"exit status {status}")
