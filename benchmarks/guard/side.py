"""One side of a comparison: a process that imports one folder's rlhf_kernels (worker.py), seen from outside."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.harness.peers import ROOT
from benchmarks.harness.worker import Ended, Worker


class Cannot(Exception):
    """Why a side cannot do a case."""


class Side:
    def __init__(self, folder: Path, threads: int, tiny: bool, wrapper: tuple[str, ...] = ()) -> None:
        path = os.pathsep.join(map(str, (folder, ROOT)))  # the folder's rlhf_kernels, this benchmarks
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}
        command = [*wrapper, sys.executable, "-P", "-m", "benchmarks.guard.worker", *(["--tiny"] if tiny else [])]
        self.worker = Worker(command, folder, own)
        self.folder = folder

    def receive_facts(self) -> None:
        """The worker's description of itself, once it has started."""
        try:
            self.facts = self.worker.receive()
        except Ended as error:
            raise Ended(f"the process that measures {self.folder} ended: {error}") from error
        if Path(self.facts["file"]).resolve().parents[1] != self.folder.resolve():
            raise Ended(f"{self.folder} was to be measured, and {self.facts['file']} was imported")

    def request(self, command: str, case: str) -> dict:
        self.worker.send([command, case])
        answer = self.worker.receive()
        if "cannot" in answer:
            raise Cannot(answer["cannot"])
        return answer


@contextmanager
def sides(folders: list[Path], **options) -> Iterator[list[Side]]:
    """Workers that start side by side, and end here."""
    with ExitStack() as stack:
        started = [Side(folder, **options) for folder in folders]
        for side in started:
            stack.enter_context(side.worker)
        for side in started:
            side.receive_facts()
        yield started
