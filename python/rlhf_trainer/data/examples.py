"""Data sets: a file or hub id in, tokenised examples out, with every unusable row named before any training.

`load_groups`, `load_conversations`, `load_prompts` and `load_labelled` read any row that `formats.plain_row` knows,
and return `Loaded`, or raise a UsageError that names file, row and field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Required, TypedDict, TypeVar, Unpack

from transformers import PreTrainedTokenizerBase

from ..config.base import DataConfig, RowFormat
from ..errors import RowError, UsageError
from .chat import conversation_ids, prefix_of
from .columns import comparisons, label, need, need_any, need_list, need_text
from .encoding import encode_bounded_prompt, encode_prompt, encode_response
from .formats import plain_row
from .rows import RowProblem, listing, read_rows

PROMPT_COLUMNS = ("prompt", "messages", "text")  # where a prompt is looked for, in this order
Example = TypeVar("Example")


class Group(NamedTuple):
    """Token ids of a prompt and of K distinct responses to it; `pairs` are positions of (better, worse) among these.

    `row` is the line of a JSONL file, or the row, counted from 1; margins [P]: how much better the better one is,
    0 where the data do not say.
    """

    row: int
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    margins: list[float]

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt) + max(map(len, self.responses))


class TokenSequence(NamedTuple):
    """Token ids of one conversation, and which of them are learned."""

    row: int
    ids: list[int]
    counted: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)


class Prompt(NamedTuple):
    """A prompt, as text or messages and as token ids; `answer` is the row's own, where it has one.

    `columns` are the row's other plain columns, for rewards: all but prompt, messages and text. `opening` is the part of
    the completion that the prompt's end writes already, "<think>\\n" of some chat templates: rewards read it in front.
    """

    row: int
    prompt: str | list[dict[str, str]]
    ids: list[int]
    answer: str | list[dict[str, str]] | None
    columns: Mapping[str, Any] = MappingProxyType({})  # a default that nobody can write into
    opening: str = ""

    @property
    def length(self) -> int:
        return len(self.ids)


class Labelled(NamedTuple):
    """Token ids of a prompt and one completion, which is good (`label`) or bad."""

    row: int
    prompt: list[int]
    completion: list[int]
    label: bool

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


class Loaded(NamedTuple, Generic[Example]):
    """The usable examples of a source, and what happened to the others."""

    examples: list[Example]
    skipped: list[str]
    cut: int
    noun: str = "examples"

    def report(self, source: str) -> str:
        lines = [f"{source}: {len(self.examples)} {self.noun}"]
        if self.cut:
            lines.append(f"{self.cut} sequences cut at max_length")
        if self.skipped:
            lines.append(f"{len(self.skipped)} invalid rows skipped:\n" + listing(self.skipped))
        return ", ".join(lines)


class Reading(TypedDict, total=False):
    """Options of every loader."""

    split: Required[str]  # of a hub data set
    config: str | None  # of a hub data set: its configuration, or subset
    format: RowFormat
    streaming: bool  # a hub data set row by row, not downloaded whole first
    skip_invalid_rows: bool
    max_examples: int | None  # only so many, from the start


def reading_of(config: DataConfig, split: str) -> Reading:
    return {
        "split": split, "config": config.dataset_config, "format": config.dataset_format,
        "streaming": config.dataset_streaming, "skip_invalid_rows": config.skip_invalid_rows,
    }  # fmt: skip


# --- pairs


def load_groups(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_length: int,
    **reading: Unpack[Reading],
) -> Loaded[Group]:
    """Prompts with their responses, and which response is better than which."""

    def group_of(number: int, row: dict[str, Any]) -> tuple[list[Group], int]:
        prompt = encode_bounded_prompt(tokenizer, need(row, "prompt"), max_prompt_length)
        room, cut = max_length - len(prompt), 0
        positions: dict[str, int] = {}  # of each field's response among `responses`
        group = Group(number, prompt, [], [], [])
        for *pair, margin in comparisons(row):
            for field, response in pair:
                if field not in positions:
                    ids = encode_response(tokenizer, row["prompt"], response, field)
                    cut += len(ids) > room
                    if ids[:room] not in group.responses:  # responses of the same tokens are one
                        group.responses.append(ids[:room])
                    positions[field] = group.responses.index(ids[:room])
            (better, _), (worse, _) = pair
            group.pairs.append((positions[better], positions[worse]))
            group.margins.append(margin)
        return [group], cut

    loaded = _load(source, tokenizer, group_of, "prompts with pairs", **reading)
    return loaded._replace(noun=f"prompts with {sum(len(group.pairs) for group in loaded.examples)} pairs")


# --- conversations


def load_conversations(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
    **reading: Unpack[Reading],
) -> Loaded[TokenSequence]:
    """Conversations for supervised fine-tuning; one that is longer than max_length loses its end.

    `messages` are learned where the assistant wrote them (in all its turns, or in the last), or whole; a completion, or
    a chosen response, without its prompt; a bare text, whole.
    """

    def sequence_of(number: int, row: dict[str, Any]) -> tuple[list[TokenSequence], int]:
        field, ids, counted = _conversation(tokenizer, row, assistant_only_loss, last_turn_only)
        if not any(counted[1:max_length]):  # nothing predicts the first token
            beyond = f", after cutting {len(ids)} tokens to max_length={max_length}" if len(ids) > max_length else ""
            raise RowError(field, f"no token is left to learn{beyond}")
        counted[0] = False
        return [TokenSequence(number, ids[:max_length], counted[:max_length])], int(len(ids) > max_length)

    return _load(source, tokenizer, sequence_of, "conversations", **reading)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], assistant_only_loss: bool, last_turn_only: bool
) -> tuple[str, list[int], list[bool]]:
    """(the field that holds what is learned, ids, which of them are learned)."""
    if "messages" in row:
        return "messages", *conversation_ids(
            tokenizer, row["messages"], assistant_only_loss=assistant_only_loss, last_turn_only=last_turn_only
        )
    if "text" in row and "prompt" not in row:
        ids = encode_prompt(tokenizer, need_text(row, "text"), "text")
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return "text", ids, [True] * len(ids)
    prompt = need(row, "prompt")
    field = need_any(row, ("completion", "chosen"))
    ids = encode_prompt(tokenizer, prompt)
    response = encode_response(tokenizer, prompt, row[field], field)
    return field, ids + response, [False] * len(ids) + [True] * len(response)


# --- prompts


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    **reading: Unpack[Reading],
) -> Loaded[Prompt]:
    """Prompts to answer; the first few tokens of a bare text are one."""

    def prompt_of(number: int, row: dict[str, Any]) -> tuple[list[Prompt], int]:
        field, prompt, answer = _prompt_and_answer(tokenizer, row)
        ids = encode_bounded_prompt(tokenizer, prompt, max_prompt_length, field)
        columns = {column: value for column, value in row.items() if column not in PROMPT_COLUMNS}
        return [Prompt(number, prompt, ids, answer, columns)], 0

    return _load(source, tokenizer, prompt_of, "prompts", **reading)


def json_columns(prompt: Prompt) -> dict[str, Any]:
    """The prompt's columns that JSON can hold, to travel with its completions; dates and images, say, stay behind."""
    kept = {}
    for name, value in prompt.columns.items():
        with suppress(TypeError, ValueError):
            json.dumps(value)
            kept[name] = value
    return kept


def _prompt_and_answer(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> tuple[str, Any, Any]:
    """(the field that holds the prompt, the prompt, the answer or None)."""
    field = need_any(row, PROMPT_COLUMNS)
    if field == "prompt":
        return field, row["prompt"], row.get("completion", row.get("chosen"))
    if field == "text":
        prompt = prefix_of(tokenizer, need_text(row, "text"))
        return field, prompt, row["text"][len(prompt) :]
    messages = need_list(row, "messages")
    is_answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    return (field, messages[:-1], messages[-1:]) if is_answered else (field, messages, None)


# --- single completions


def load_labelled(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_length: int,
    **reading: Unpack[Reading],
) -> Loaded[Labelled]:
    """Completions labelled good or bad; a pair gives one of each."""

    def labelled_of(number: int, row: dict[str, Any]) -> tuple[list[Labelled], int]:
        if "completion" in row or "chosen" not in row:
            responses = [("completion", need(row, "completion"), label(row))]
        else:
            responses = [("chosen", row["chosen"], True), ("rejected", need(row, "rejected"), False)]
        prompt = encode_bounded_prompt(tokenizer, need(row, "prompt"), max_prompt_length)
        room = max_length - len(prompt)
        cut = 0
        examples = []
        for field, response, is_good in responses:
            ids = encode_response(tokenizer, row["prompt"], response, field)
            cut += len(ids) > room
            examples.append(Labelled(number, prompt, ids[:room], is_good))
        return examples, cut

    return _load(source, tokenizer, labelled_of, "labelled completions", **reading)


# --- what all loaders share


def _load(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    examples_of: Callable[[int, dict[str, Any]], tuple[list[Example], int]],
    noun: str,
    *,
    split: str,
    config: str | None = None,
    format: RowFormat = "auto",
    streaming: bool = False,
    skip_invalid_rows: bool = False,
    max_examples: int | None = None,
) -> Loaded[Example]:
    """`examples_of` (row number, plain row) -> (its examples, how many sequences were cut), or RowError."""
    examples: list[Example] = []
    problems: list[str] = []
    cut = rows = 0
    for number, row in read_rows(source, split, config=config, streaming=streaming):
        rows += 1
        try:
            if isinstance(row, RowProblem):
                raise RowError("row", row)
            of_row, cut_of_row = examples_of(number, plain_row(row, format, chat=bool(tokenizer.chat_template)))
        except RowError as error:
            problems.append(f"row {number}, {error}")
            continue
        examples += of_row
        cut += cut_of_row
        if max_examples is not None and len(examples) >= max_examples:
            del examples[max_examples:]
            break
    if rows == 0:
        raise UsageError(f"{source} is empty: expected rows that make {noun}")
    if problems and not (skip_invalid_rows and examples):
        hint = "Every row is unusable." if not examples else "Fix them, or pass --skip_invalid_rows to leave them out."
        raise UsageError(f"{source}: {len(problems)} of {rows} rows cannot be used:\n{listing(problems)}\n{hint}")
    return Loaded(examples, problems, cut, noun)
