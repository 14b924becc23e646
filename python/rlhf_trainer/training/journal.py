"""A journal of work that one process does batch by batch: an interrupted run resumes behind the results it has kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from ..errors import UsageError
from .batch_plan import plan_batches
from .files import checksum


def batches_of_like_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """lengths [N] -> batches that partition range(N), the longest first: too little memory shows at the start."""
    if not lengths:
        return []
    (batches,) = plan_batches(lengths, len(lengths), batch_size, seed=None)
    return batches[::-1]


LINES = 10  # of a journal's progress, where there is no terminal
RunBatch = Callable[[Callable[[], Any]], Any]  # computes a batch's result and returns it; `Journal.run` keeps it, too


def compute_only(compute: Callable[[], Any]) -> Any:
    """The `RunBatch` that keeps nothing."""
    return compute()


class Journal:
    """The results of batches in a file, one line each. Those that an interrupted run has left are not computed again.

    `data`: what the results depend on beside the configuration; a file of other data is refused. A line is written at
    once and whole; one that was cut off by the interruption is dropped.
    """

    def __init__(self, path: Path, total: int, description: str, data: Any) -> None:
        self.path = path
        header = json.dumps({"data": checksum(repr(data).encode())}) + "\n"
        path.touch()
        lines = whole_lines(path)
        if lines and lines[0] != header.encode():
            raise UsageError(
                f"{path}: the data or a tokenizer is not the one that the run began with, so --resume_from_checkpoint "
                "cannot go on with it"
            )
        os.truncate(path, sum(map(len, lines)))
        self.known = [json.loads(line) for line in lines[1:]]
        self.file = path.open("a", encoding="utf-8")
        if not lines:
            self._write(header)
        self.position = 0
        self.bar = tqdm(total=total, initial=len(self.known), desc=description, unit="batch", disable=None)
        self.total, self.description = total, description
        if self.known:
            self.bar.write(f"resumed from batch {len(self.known)} of {total}")

    def run(self, compute: Callable[[], Any]) -> Any:
        """The result of the next batch, which is JSON: as an earlier run left it, or computed and kept."""
        if self.position < len(self.known):
            result = self.known[self.position]
        else:
            result = compute()
            self._write(json.dumps(result) + "\n")
            self.bar.update()
            if self.bar.disable and (self.position + 1) * LINES // self.total > self.position * LINES // self.total:
                print(f"{self.description}: batch {self.position + 1} of {self.total}", flush=True)
        self.position += 1
        return result

    def expect(self, batches: int) -> None:
        """Adds batches that the start of the run did not know of."""
        self.total += batches
        self.bar.total = self.total
        self.bar.refresh()

    def _write(self, line: str) -> None:
        self.file.write(line)
        self.file.flush()

    def remove(self) -> None:
        """Deletes the file, after the last batch, when the results are elsewhere."""
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self.file.close()


def whole_lines(path: Path) -> list[bytes]:
    """The lines up to the first that is damaged or was cut off."""
    lines: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        lines.append(line)
    return lines


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
