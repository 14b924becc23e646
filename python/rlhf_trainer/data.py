"""Preference data: a file or hub id in, tokenised pairs out, with every unusable row named before any training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .chat import RowError, prompt_text, response_text
from .errors import UsageError

COLUMNS = ("prompt", "chosen", "rejected")
SHOWN_ERRORS = 5
IGNORED = -100


class Pair(NamedTuple):
    """Token ids of a prompt and its two responses; `row` is the line of a JSONL file, or the row, counted from 1."""

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Batch(NamedTuple):
    """S sequences padded to one length T; of P pairs, S = 2P: the chosen ones first, then the rejected ones."""

    input_ids: Tensor  # [S, T] int64
    attention_mask: Tensor  # [S, T] int64
    labels: Tensor  # [S, T] int64, IGNORED on prompt and padding

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


class PairData(NamedTuple):
    """The usable pairs of a source, and what happened to the others."""

    pairs: list[Pair]
    skipped: list[str]
    cut: int

    def report(self, source: str) -> str:
        lines = [f"{source}: {len(self.pairs)} pairs"]
        if self.cut:
            lines.append(f"{self.cut} responses cut at max_length")
        if self.skipped:
            lines.append(f"{len(self.skipped)} invalid rows skipped:\n" + _listing(self.skipped))
        return ", ".join(lines)


def load_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    max_prompt_length: int,
    max_length: int,
    skip_invalid_rows: bool = False,
) -> PairData:
    """Reads, checks and tokenises every row; UsageError naming file, row and field, unless rows may be skipped."""
    pairs, problems, cut, rows = [], [], 0, 0
    for number, row in read_rows(source, split):
        rows += 1
        try:
            pair, pair_cut = tokenize_pair(tokenizer, number, row, max_prompt_length, max_length)
        except RowError as error:
            problems.append(f"row {number}, {error}")
            continue
        pairs.append(pair)
        cut += pair_cut
    if rows == 0:
        raise UsageError(f"{source} is empty: expected rows with the fields {', '.join(COLUMNS)}")
    if problems and not (skip_invalid_rows and pairs):
        hint = "Every row is unusable." if not pairs else "Fix them, or pass --skip_invalid_rows to leave them out."
        raise UsageError(f"{source}: {len(problems)} of {rows} rows cannot be used:\n{_listing(problems)}\n{hint}")
    return PairData(pairs, problems, cut)


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, number: int, row: Any, max_prompt_length: int, max_length: int
) -> tuple[Pair, int]:
    """One row -> (its Pair, how many of its responses were cut to max_length).

    Prompt and response are tokenised apart: both responses then continue the same prompt tokens, the very ones from
    which generation starts.
    """
    if not isinstance(row, dict):
        raise RowError("row", str(row) if isinstance(row, RowProblem) else f"expected a mapping, got {row!r}")
    for column in COLUMNS:
        if row.get(column) is None:
            raise RowError(column, f"missing; the row has: {', '.join(k for k, v in row.items() if v is not None)}")
    text = prompt_text(tokenizer, row["prompt"])
    is_chat = not isinstance(row["prompt"], str)  # a template writes the special tokens itself
    prompt = tokenizer(text, add_special_tokens=not is_chat).input_ids
    if not is_chat and prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text; this one goes on
    if not prompt:
        raise RowError("prompt", "has no tokens: the first token of a response is predicted from the prompt's last")
    if len(prompt) > max_prompt_length:
        raise RowError("prompt", f"has {len(prompt)} tokens, over max_prompt_length={max_prompt_length}")
    responses = []
    for column in ("chosen", "rejected"):
        ids = tokenizer(
            response_text(tokenizer, row["prompt"], row[column], column), add_special_tokens=False
        ).input_ids
        if not ids:
            raise RowError(column, "all tokens are masked: the tokenizer makes no token of the response")
        responses.append(ids)
    room = max_length - len(prompt)
    cut = sum(len(ids) > room for ids in responses)
    return Pair(number, prompt, responses[0][:room], responses[1][:room]), cut


def collate(pairs: list[Pair], pad_id: int) -> Batch:
    """P pairs -> Batch of [2P, T]: the chosen sequences, then the rejected ones."""
    return pad_sequences([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs], pad_id)


def pad_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (prompt, response) -> Batch of [S, T], padded on the right, where no real token of a causal model sees it."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(response)
    return Batch(input_ids, attention_mask, labels)


def read_rows(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a .jsonl or .parquet file, or of a split of a hub data set."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _read_jsonl(path)
    if path.suffix == ".parquet" and path.is_file():
        return _read_parquet(path)
    if path.exists():
        raise UsageError(f"{source}: expected a .jsonl or .parquet file")
    if path.suffix in (".jsonl", ".parquet") or path.is_absolute() or source.startswith("."):
        raise UsageError(f"{source}: no such file")
    return _read_hub(source, split)


class RowProblem(str):
    """Stands in for a row that could not even be parsed."""


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                yield number, RowProblem(f"not JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _check_columns(str(path), file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=list(COLUMNS)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable Parquet file: {error}") from error


def _read_hub(name: str, split: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # offline, unknown name, unknown split, a script: datasets raises many kinds
        raise UsageError(
            f"{name}: neither a file here nor a readable hub data set (split {split!r}): {error}"
        ) from error
    _check_columns(name, data.column_names)
    return enumerate(data.select_columns(list(COLUMNS)), start=1)


def _check_columns(source: str, names: list[str]) -> None:
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise UsageError(f"{source}: column {', '.join(map(repr, missing))} is missing; it has: {', '.join(names)}")


def _listing(problems: list[str]) -> str:
    more = [f"  ... and {len(problems) - SHOWN_ERRORS} more"] if len(problems) > SHOWN_ERRORS else []
    return "\n".join([f"  {problem}" for problem in problems[:SHOWN_ERRORS]] + more)
