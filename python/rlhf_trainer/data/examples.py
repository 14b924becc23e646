"""Data sets: a file or hub id in, tokenised examples out, with every unusable row named before any training.

`load_groups`, `load_conversations` and `load_prompts` read any row that `formats.plain_row` knows,
and return `Loaded`, or raise a UsageError that names file, row and field.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from ..config.base import DataConfig, RowFormat
from ..errors import RowError, UsageError
from .chat import plain_messages, template_options
from .columns import comparisons, need, need_any, need_list, need_text
from .encoding import Codec, encode_conversation, encode_pairs, encode_text, prefix_of, prompt_ids, prompt_text
from .formats import plain_row
from .rows import RowProblem, listing, read_rows

PROMPT_COLUMNS = ("prompt", "messages", "text")  # where a prompt is looked for, in this order
OPENING = re.compile(r"<think>\s*$")  # at the end of a prompt's text: the completion has only the end of the thoughts
Example = TypeVar("Example")
# (row number, plain row) -> its examples, and how many sequences were cut; RowError for a row that makes none
Reader = Callable[[int, dict[str, Any]], tuple[list[Example], int]]


class Group(NamedTuple):
    """Token ids of a prompt and of K distinct responses to it; `pairs` are positions of (better, worse) among these.

    `row` is the line of a JSONL file, or the row, counted from 1; margins [P]: how much better the better one is,
    0 where the data do not say. `is_rewarded`: responses are as reward models read them, which look at the last token.
    """

    row: int
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    margins: list[float]
    is_rewarded: bool = False

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

    `columns` are the row's other plain columns, for rewards: all but prompt, messages and text. `text` is what the ids
    are of: messages as the chat template renders them.
    """

    row: int
    prompt: str | list[dict[str, str]]
    ids: list[int]
    answer: str | list[dict[str, str]] | None
    columns: Mapping[str, Any] = MappingProxyType({})  # a default that nobody can write into
    text: str = ""

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def options(self) -> dict[str, Any]:
        """What its row passes to a chat template."""
        return template_options(self.columns)

    @property
    def opening(self) -> str:
        """The part of the completion that the prompt's end writes already, "<think>" and a line break in some chat
        templates: the completion has only the end of its thoughts, and rewards read this in front of it."""
        match = OPENING.search(self.text)
        return match[0] if match else ""

    def opened(self, completion: str) -> str:
        """A completion's text with the opening in front, unless it is there."""
        return completion if completion.lstrip().startswith(self.opening.strip()) else self.opening + completion


class Loaded(NamedTuple, Generic[Example]):
    """The usable examples of a source, and what happened to the others."""

    examples: list[Example]
    skipped: list[str]
    cut: int
    noun: str = "examples"
    notes: tuple[str, ...] = ()

    def report(self, source: str) -> str:
        lines = [f"{source}: {len(self.examples)} {self.noun}"]
        if self.cut:
            lines.append(f"{self.cut} sequences cut at max_length")
        if self.skipped:
            lines.append(f"{len(self.skipped)} invalid rows skipped:\n" + listing(self.skipped))
        return "\n".join([", ".join(lines), *(f"  note: {note}" for note in self.notes)])


class Reading(NamedTuple):
    """Options of every loader."""

    split: str  # of a hub data set
    config: str | None = None  # of a hub data set: its configuration, or subset
    format: RowFormat = "auto"
    streaming: bool = False  # a hub data set row by row, not downloaded whole first
    skip_invalid_rows: bool = False
    max_examples: int | None = None  # only so many, from the start


def reading_of(config: DataConfig, split: str) -> dict[str, Any]:
    """The fields of `Reading` that a configuration has, which every loader takes."""
    return {
        "split": split, "config": config.dataset_config, "format": config.dataset_format,
        "streaming": config.dataset_streaming, "skip_invalid_rows": config.skip_invalid_rows,
    }  # fmt: skip


# --- pairs


def load_groups(
    source: str, codec: Codec, *, max_prompt_length: int, max_length: int, keep_rendering: bool = False, **reading: Any
) -> Loaded[Group]:
    """Prompts with their responses, and which response is better than which. keep_rendering: as reward models read
    them, see `encode_pairs`."""

    def group_of(number: int, row: dict[str, Any]) -> tuple[list[Group], int]:
        need(row, "prompt")
        compared = comparisons(row)
        responses = dict(response for *pair, _ in compared for response in pair)
        prompt, encoded = encode_pairs(
            codec, row["prompt"], list(responses.items()), template_options(row), limit=max_prompt_length,
            keep_rendering=keep_rendering,
        )  # fmt: skip
        room = max_length - len(prompt)
        fitting = [tuple(ids[:room]) for ids in encoded]
        distinct = list(dict.fromkeys(fitting))  # responses of the same tokens are one
        positions = {field: distinct.index(ids) for field, ids in zip(responses, fitting, strict=True)}
        pairs = [(positions[better], positions[worse]) for (better, _), (worse, _), _ in compared]
        margins = [margin for *_, margin in compared]
        group = Group(number, prompt, list(map(list, distinct)), pairs, margins, keep_rendering)
        return [group], sum(len(ids) > room for ids in encoded)

    loaded = _load(source, codec, group_of, "prompts with pairs", Reading(**reading))
    return loaded._replace(noun=f"prompts with {sum(len(group.pairs) for group in loaded.examples)} pairs")


# --- conversations


def load_conversations(
    source: str,
    codec: Codec,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
    **reading: Any,
) -> Loaded[TokenSequence]:
    """Conversations for supervised fine-tuning; one that is longer than max_length loses its end.

    `messages` are learned where the assistant wrote them (in all its turns, or in the last), or whole; a completion, or
    a chosen response, without its prompt; a bare text, whole.
    """

    def sequence_of(number: int, row: dict[str, Any]) -> tuple[list[TokenSequence], int]:
        field, ids, counted = _conversation(codec, row, assistant_only_loss, last_turn_only)
        if not any(counted[1:max_length]):  # nothing predicts the first token
            beyond = f", after cutting {len(ids)} tokens to max_length={max_length}" if len(ids) > max_length else ""
            raise RowError(field, f"no token is left to learn{beyond}")
        counted[0] = False
        return [TokenSequence(number, ids[:max_length], counted[:max_length])], int(len(ids) > max_length)

    return _load(source, codec, sequence_of, "conversations", Reading(**reading))


def _conversation(
    codec: Codec, row: dict[str, Any], assistant_only_loss: bool, last_turn_only: bool
) -> tuple[str, list[int], list[bool]]:
    """(the field that holds what is learned, ids, which of them are learned)."""
    options = template_options(row)
    if "messages" in row:
        return "messages", *encode_conversation(
            codec, row["messages"], options, assistant_only_loss=assistant_only_loss, last_turn_only=last_turn_only
        )
    if "text" in row and "prompt" not in row:
        ids = encode_text(codec, need_text(row, "text"))
        return "text", ids, [True] * len(ids)
    prompt = need(row, "prompt")
    field = need_any(row, ("completion", "chosen"))
    ids, (response,) = encode_pairs(codec, prompt, [(field, row[field])], options)
    return field, ids + response, [False] * len(ids) + [True] * len(response)


# --- prompts


def load_prompts(source: str, codec: Codec, *, max_prompt_length: int, **reading: Any) -> Loaded[Prompt]:
    """Prompts to answer; the first few tokens of a bare text are one."""

    def prompt_of(number: int, row: dict[str, Any]) -> tuple[list[Prompt], int]:
        field, prompt, answer = _prompt_and_answer(codec, row)
        text = prompt_text(codec, prompt, field, template_options(row))
        ids = prompt_ids(codec, text, field, limit=max_prompt_length)
        columns = {column: value for column, value in row.items() if column not in PROMPT_COLUMNS}
        return [Prompt(number, prompt, ids, answer, columns, text)], 0

    return _load(source, codec, prompt_of, "prompts", Reading(**reading))


def json_columns(prompt: Prompt) -> dict[str, Any]:
    """The prompt's columns that JSON can hold, to travel with its completions; dates and images, say, stay behind."""
    kept = {}
    for name, value in prompt.columns.items():
        with suppress(TypeError, ValueError):
            json.dumps(value)
            kept[name] = value
    return kept


def _prompt_and_answer(codec: Codec, row: dict[str, Any]) -> tuple[str, Any, Any]:
    """(the field that holds the prompt, the prompt, the answer or None)."""
    field = need_any(row, PROMPT_COLUMNS)
    if field == "prompt":
        prompt = row["prompt"]
        prompt = plain_messages(prompt, field) if isinstance(prompt, list) else prompt
        return field, prompt, row.get("completion", row.get("chosen"))
    if field == "text":
        prompt = prefix_of(codec, need_text(row, "text"))
        return field, prompt, row["text"][len(prompt) :]
    messages = plain_messages(need_list(row, "messages"), field)
    return (field, messages[:-1], messages[-1:]) if messages[-1]["role"] == "assistant" else (field, messages, None)


# --- what all loaders share


def _load(source: str, codec: Codec, examples_of: Reader[Example], noun: str, reading: Reading) -> Loaded[Example]:
    examples: list[Example] = []
    problems: list[str] = []
    cut = rows = 0
    is_chat = bool(codec.tokenizer.chat_template)
    codec.notes.clear()
    for number, row in read_rows(source, reading.split, config=reading.config, streaming=reading.streaming):
        rows += 1
        try:
            if isinstance(row, RowProblem):
                raise RowError("row", row)
            of_row, cut_of_row = examples_of(number, plain_row(row, reading.format, chat=is_chat))
        except RowError as error:
            problems.append(f"row {number}, {error}")
            continue
        except UsageError:
            raise
        except Exception as error:  # templates and tokenizers are others' programs; a row may be too much for them
            problems.append(f"row {number}, {RowError('row', f'cannot be read: {type(error).__name__}: {error}')}")
            continue
        examples += of_row
        cut += cut_of_row
        if reading.max_examples is not None and len(examples) >= reading.max_examples:
            del examples[reading.max_examples :]
            break
    if rows == 0:
        raise UsageError(f"{source} is empty: expected rows that make {noun}")
    if problems and not (reading.skip_invalid_rows and examples):
        hint = "Every row is unusable." if not examples else "Fix them, or pass --skip_invalid_rows to leave them out."
        raise UsageError(f"{source}: {len(problems)} of {rows} rows cannot be used:\n{listing(problems)}\n{hint}")
    notes = tuple(f"{note} ({count} responses)" for note, count in codec.notes.items())
    return Loaded(examples, problems, cut, noun, notes)
