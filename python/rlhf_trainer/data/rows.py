"""Rows of a file or of a hub data set, one after the other, as they are."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RowError, UsageError, kind

Checked = TypeVar("Checked")
SHOWN_ERRORS = 5
PARQUET_ROWS = 256  # read at once: arrow cannot hold over 2 GB of nested text in a column


class RowProblem(str):
    """The reason why a row could not even be parsed, in the place of the row."""


def read_rows(
    source: str, split: str, *, config: str | None = None, streaming: bool = False
) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a .jsonl, .json, .csv or .parquet file, or of a split of a hub data set (of its
    `config`).

    In a JSONL file the number is that of the line. A hub data set is downloaded whole first, unless `streaming`.
    """
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix in readers and os.path.isfile(source):
        return readers[path.suffix](path)
    if os.path.exists(source):
        raise UsageError(f"{source}: expected a file that ends in {', '.join(readers)}")
    if path.suffix in readers or path.is_absolute() or source.startswith("."):
        raise UsageError(f"{source}: no such file")
    return _read_hub(source, split, config, streaming)


def listing(problems: list[str]) -> str:
    """The first problems, a line each, and how many more there are."""
    more = [f"  ... and {len(problems) - SHOWN_ERRORS} more"] if len(problems) > SHOWN_ERRORS else []
    return "\n".join([f"  {problem}" for problem in problems[:SHOWN_ERRORS]] + more)


def read_checked(
    source: str, check: Callable[[int, dict[str, Any]], Checked], noun: str, expected: str
) -> list[Checked]:
    """`check(number, row)` of every row of a file that another command wrote; UsageError naming those that it refuses
    by RowError. `noun`: what rows should be; `expected`: the same for the message about an empty file."""
    results: list[Checked] = []
    problems: list[str] = []
    for number, row in read_rows(source, split="train"):
        try:
            if isinstance(row, RowProblem) or not isinstance(row, dict):
                raise RowError("row", row if isinstance(row, RowProblem) else f"expected a mapping, got {kind(row)}")
            results.append(check(number, row))
        except RowError as error:
            problems.append(f"row {number}, {error}")
    if problems:
        raise UsageError(f"{source}: {len(problems)} rows are not {noun}:\n{listing(problems)}")
    if not results:
        raise UsageError(f"{source} is empty: expected {expected}")
    return results


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; of deep nesting
                yield number, RowProblem(f"not JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a list, or a row a line."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = next((line.lstrip()[0] for line in file if line.strip()), "")
    if start != "[":
        yield from _read_jsonl(path)
        return
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected a list of rows, or a row a line; not JSON: {error}") from error
    yield from enumerate(rows, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of text under the header's names; None where a cell is empty."""
    csv.field_size_limit(sys.maxsize)  # else 128 kB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for number, row in enumerate(reader, start=1):
                extra = row.pop(None, None)  # cells without a name
                problem = RowProblem(
                    f"{len(extra or ())} more cells than the header has names: quote cells with commas"
                )
                yield number, problem if extra else {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable CSV file (UTF-8, commas, double quotes): {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(PARQUET_ROWS)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable Parquet file: {error}") from error


def _read_hub(name: str, split: str, config: str | None, streaming: bool) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    rows = 0
    try:
        for row in load_dataset(name, config, split=split, streaming=streaming):
            rows += 1
            yield rows, row
    except Exception as error:  # offline, unknown name, unknown split, a script: datasets raises many kinds
        where = f", after row {rows}" if rows else ""  # a stream may break off in the middle
        raise UsageError(
            f"{name}: neither a file here nor a readable hub data set (split {split!r}){where}: {error}"
        ) from error
