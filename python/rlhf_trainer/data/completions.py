"""The JSONL layouts that commands hand on: completions, scored completions, pairs."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from .chat import check_prompt, check_response, template_options
from .columns import expect, need, number
from .encoding import Codec, encode_prompt, encode_rendering, is_empty, like_prompt
from .examples import Prompt, json_columns
from .rows import read_checked

COMPLETIONS_FILE, SCORED_FILE, PAIRS_FILE = "completions.jsonl", "scored.jsonl", "pairs.jsonl"
OPTIONAL = {  # keys of a completion, in the order of `Row`: type, and type in words
    "model": (str, "text"),
    "finished": (bool, "true or false"),
    "columns": (dict, "a mapping"),
    "opening": (str, "text"),
}
UNFINISHED, EMPTY, TOO_LONG = "unfinished", "empty", "too long"  # reasons to leave a completion out


def row_of(prompt: Prompt, model: str, text: str, finished: bool | None) -> dict[str, Any]:
    """A line of completions.jsonl, or of failures.jsonl."""
    source = {"model": model, "prompt_row": prompt.row}
    answer = {} if prompt.answer is None else {"answer": prompt.answer}
    columns = json_columns(prompt)
    if finished is None:
        return answer | columns | {"prompt": prompt.prompt, **source, "reason": text}
    completion = like_prompt(prompt.prompt, text)
    row = {"prompt": prompt.prompt, "completion": completion, **source, "finished": finished, **answer}
    if prompt.opening:
        row["opening"] = prompt.opening
    return row | ({"columns": columns} if columns else {})


class Row(NamedTuple):
    """A completion that a command has read. ids: of prompt and completion, as each of the reward models reads them."""

    source: str
    number: int
    prompt: Any
    completion: Any
    model: str
    finished: bool
    columns: dict[str, Any]  # of the prompt's row
    opening: str  # as in `Prompt`
    ids: list[list[int]]
    left_out: str | None  # why it cannot be selected

    @property
    def prompt_key(self) -> str:
        """A key that equal prompts share, whatever file or model they come from."""
        return json.dumps(self.prompt, sort_keys=True)


def files_in(names: Sequence[str], file_name: str, key: str) -> list[str]:
    """The files that `names` stand for, a folder for its file of that name; UsageError for a duplicate."""
    files = [str(Path(name) / file_name) if Path(name).is_dir() else name for name in names]
    places = Counter(Path(file).resolve() for file in files)
    duplicates = [str(place) for place, times in places.items() if times > 1]
    if duplicates:
        raise UsageError(f"{key}: duplicate {duplicates[0]}; name each file once")
    return files


def read_completions(file: str, codecs: Sequence[Codec], max_length: int) -> list[Row]:
    """All rows; UsageError naming those that are not completions. `model` is text, by default the file's name;
    `finished` true or false, by default true; `columns` a mapping, by default an empty one; `opening` text, by default
    none."""
    return read_checked(
        file, lambda number, row: checked_row(file, number, row, codecs, max_length), "completions",
        "rows with prompt and completion, as `rlhf sample` writes them",
    )  # fmt: skip


def checked_row(file: str, number: int, row: dict[str, Any], codecs: Sequence[Codec], max_length: int) -> Row:
    prompt, completion = need(row, "prompt"), need(row, "completion")
    values = {"model": file, "opening": "", "finished": True} | row
    values["columns"] = {} if row.get("columns") is None else row["columns"]
    for field, expected in OPTIONAL.items():
        expect(field, values[field], *expected)
    check_prompt(prompt)
    options, problem = template_options(values["columns"]), None
    if is_empty(completion):
        ids, problem = [encode_prompt(codec, prompt, "prompt", options) for codec in codecs], EMPTY
    else:
        check_response(prompt, completion, "completion")
        ids = [encode_rendering(codec, prompt, completion, "completion", options) for codec in codecs]
        if not values["finished"]:
            problem = UNFINISHED
        elif any(len(sequence) > max_length for sequence in ids):
            problem = TOO_LONG
    return Row(file, number, prompt, completion, *(values[field] for field in OPTIONAL), ids, problem)


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_scored(row: Row, reward: float | None, parts: dict[str, float | None]) -> dict[str, Any]:
    """A line of scored.jsonl. `reward` is null where `left_out` says why; `rewards` has each of several functions."""
    return {
        "prompt": row.prompt, "completion": row.completion, "model": row.model, "finished": row.finished,
        "reward": reward, "left_out": row.left_out,
    } | ({"rewards": parts} if len(parts) > 1 else {})  # fmt: skip


def as_selected(row: Row, reward: float) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": row.completion, "reward": reward, "model": row.model}


def left_out(rows: Sequence[Row]) -> dict[str, int]:
    counts = Counter(row.left_out for row in rows)
    return {reason: counts[reason] for reason in (UNFINISHED, EMPTY, TOO_LONG)}


def in_numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def read_scored(file: str) -> list[dict[str, Any]]:
    """All lines; UsageError naming those that are not scored completions."""
    expected = "rows with prompt, completion and reward, as `rlhf rejection` writes them"
    return read_checked(file, checked_line, "scored completions", expected)


def checked_line(_number: int, line: dict[str, Any]) -> dict[str, Any]:
    for field in ("prompt", "completion"):
        expect(field, need(line, field), str | list, "text or a list of messages")
    if need(line, "reward") is not None:  # None: left out
        number("reward", line["reward"])
    return line
