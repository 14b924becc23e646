"""Steps and rewards of the recipes that are no commands: a recipe calls them as it calls functions of its user's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.completions import text_of
from ..data.rows import read_rows
from ..rewards.verifiable import EXACT
from ..training.journal import write_jsonl


def join(folder: Path, *, files: Sequence[str]) -> None:
    """Writes rows.jsonl: the rows of all files, those of the first file first."""
    write_jsonl(folder / "rows.jsonl", [row for file in files for _, row in read_rows(file, split="train")])


def right_where_known(prompts: list[Any], completions: list[Any], ground_truth: Sequence[Any] = ()) -> list[float]:
    """A reward function: 1 for the right answer, of rows that have a column `ground_truth`; 0 else."""
    texts = map(text_of, completions)
    known = ground_truth or [None] * len(completions)
    return [
        0.0 if truth is None else EXACT.score(text, EXACT.prepare(truth))
        for text, truth in zip(texts, known, strict=True)
    ]
