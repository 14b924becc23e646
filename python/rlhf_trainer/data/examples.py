"""Data sets: a file or hub id in, tokenised examples out, with every unusable row named before any training.

`load_pairs`, `load_conversations`, `load_prompts` and `load_labelled` read what they can of any row that
`formats.plain_row` knows, and end in the same way: `Loaded`, or a UsageError that names file, row and field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Required, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.base import RowFormat
from ..errors import UsageError
from .chat import RowError, Turns, conversation_ids, prefix_of, prompt_text, response_text
from .columns import comparisons, label, need, need_any, need_list, need_text
from .formats import plain_row
from .rows import RowProblem, listing, read_rows

IGNORED = -100
PROMPT_COLUMNS = ("prompt", "messages", "text")  # where a prompt is looked for, in this order
Example = TypeVar("Example")


class Pair(NamedTuple):
    """Token ids of a prompt and its two responses; `row` is the line of a JSONL file, or the row, counted from 1."""

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0  # by how much the chosen one is better, where the data say

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Sequence(NamedTuple):
    """Token ids of one conversation, and which of them are learned."""

    row: int
    ids: list[int]
    counted: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)


class Prompt(NamedTuple):
    """What a model is to answer, as text or messages and as token ids; `answer` is the row's own, where it has one.

    `columns` is what else the row says, for rewards to go by: all its plain columns but prompt, messages and text.
    """

    row: int
    prompt: str | list[dict[str, str]]
    ids: list[int]
    answer: str | list[dict[str, str]] | None
    columns: Mapping[str, Any] = MappingProxyType({})  # a default that nobody can write into

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


class Batch(NamedTuple):
    """S sequences padded to one length T; of P pairs, S = 2P: the chosen ones first, then the rejected ones."""

    input_ids: Tensor  # [S, T] int64
    attention_mask: Tensor | None  # [S, T] int64, 0 on padding; None: position_ids say which tokens see each other
    labels: Tensor  # [S, T] int64, IGNORED where nothing is learned, as on prompt and padding
    position_ids: Tensor | None = None  # [S, T] int64; None: 0, 1, 2, ... in every row

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor if tensor is None else tensor.to(device) for tensor in self))


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
    """What every loader can be told about its source."""

    split: Required[str]  # of a hub data set
    format: RowFormat
    streaming: bool  # a hub data set row by row, not downloaded whole first
    skip_invalid_rows: bool
    max_examples: int | None  # only so many, from the start


# --- text to tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any, field: str = "prompt") -> list[int]:
    """Token ids of a prompt, text or messages, up to where the response begins; RowError where there is none.

    Prompt and response are tokenised apart: all responses then continue the same prompt tokens, the very ones from
    which generation starts.
    """
    text = prompt_text(tokenizer, prompt, field)
    is_chat = not isinstance(prompt, str)  # a template writes the special tokens itself
    ids = _ids(tokenizer, text, field, add_special_tokens=not is_chat)
    if not is_chat and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; this one goes on
    if not ids:
        raise RowError(field, "has no tokens: the first token of a response is predicted from the prompt's last")
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any, field: str) -> list[int]:
    """Token ids of what follows the prompt, up to and with the token that ends the turn; RowError where none do."""
    ids = _ids(tokenizer, response_text(tokenizer, prompt, response, field), field, add_special_tokens=False)
    if not ids:
        raise RowError(field, "all tokens are masked: the tokenizer makes no token of the response")
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, field: str, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise RowError(field, f"is not text: {error}") from error
    return tokenizer(text, add_special_tokens=add_special_tokens).input_ids


def _encode_bounded_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, max_prompt_length: int, field: str = "prompt"
) -> list[int]:
    ids = encode_prompt(tokenizer, prompt, field)
    if len(ids) > max_prompt_length:
        raise RowError(field, f"has {len(ids)} tokens, over max_prompt_length={max_prompt_length}")
    return ids


# --- pairs


def load_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_length: int,
    **reading: Unpack[Reading],
) -> Loaded[Pair]:
    """Pairs of a better and a worse response; a row of several responses gives several pairs."""

    def pairs_of(number: int, row: dict[str, Any]) -> tuple[list[Pair], int]:
        prompt = _encode_bounded_prompt(tokenizer, need(row, "prompt"), max_prompt_length)
        room = max_length - len(prompt)
        cut = 0
        encoded: dict[str, list[int]] = {}
        pairs = []
        for better, worse, margin in comparisons(row):
            for field, response in (better, worse):
                if field not in encoded:
                    ids = encode_response(tokenizer, row["prompt"], response, field)
                    cut += len(ids) > room
                    encoded[field] = ids[:room]
            pairs.append(Pair(number, prompt, encoded[better[0]], encoded[worse[0]], margin))
        return pairs, cut

    return _load(source, tokenizer, pairs_of, "pairs", **reading)


# --- conversations


def load_conversations(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    turns: Turns = "all",
    **reading: Unpack[Reading],
) -> Loaded[Sequence]:
    """What supervised fine-tuning learns from; what is longer than max_length loses its end.

    Learned are: of `messages`, the assistant's turns, all or the last; of a prompt with a completion, or with a chosen
    response, that one alone; of a bare text, all of it.
    """

    def sequence_of(number: int, row: dict[str, Any]) -> tuple[list[Sequence], int]:
        field, ids, counted = _conversation(tokenizer, row, turns)
        if not any(counted[1:max_length]):  # nothing predicts the first token
            beyond = f", after cutting {len(ids)} tokens to max_length={max_length}" if len(ids) > max_length else ""
            raise RowError(field, f"no token is left to learn{beyond}")
        counted[0] = False
        return [Sequence(number, ids[:max_length], counted[:max_length])], int(len(ids) > max_length)

    return _load(source, tokenizer, sequence_of, "conversations", **reading)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], turns: Turns
) -> tuple[str, list[int], list[bool]]:
    """(the field that holds what is learned, ids, which of them are learned)."""
    if "messages" in row:
        return "messages", *conversation_ids(tokenizer, row["messages"], turns)
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
    """Prompts to answer; of a bare text, its first few tokens are the prompt."""

    def prompt_of(number: int, row: dict[str, Any]) -> tuple[list[Prompt], int]:
        field, prompt, answer = _prompt_and_answer(tokenizer, row)
        ids = _encode_bounded_prompt(tokenizer, prompt, max_prompt_length, field)
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
        prompt = _encode_bounded_prompt(tokenizer, need(row, "prompt"), max_prompt_length)
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
    format: RowFormat = "auto",
    streaming: bool = False,
    skip_invalid_rows: bool = False,
    max_examples: int | None = None,
) -> Loaded[Example]:
    """`examples_of` (row number, plain row) -> (its examples, how many sequences were cut), or RowError."""
    examples: list[Example] = []
    problems: list[str] = []
    cut = rows = 0
    for number, row in read_rows(source, split, streaming=streaming):
        rows += 1
        try:
            if isinstance(row, RowProblem):
                raise RowError("row", row)
            found, found_cut = examples_of(number, plain_row(row, format, chat=bool(tokenizer.chat_template)))
        except RowError as error:
            problems.append(f"row {number}, {error}")
            continue
        examples += found
        cut += found_cut
        if max_examples is not None and len(examples) >= max_examples:
            del examples[max_examples:]
            break
    if rows == 0:
        raise UsageError(f"{source} is empty: expected rows that make {noun}")
    if problems and not (skip_invalid_rows and examples):
        hint = "Every row is unusable." if not examples else "Fix them, or pass --skip_invalid_rows to leave them out."
        raise UsageError(f"{source}: {len(problems)} of {rows} rows cannot be used:\n{listing(problems)}\n{hint}")
    return Loaded(examples, problems, cut, noun)


# --- examples to tensors


def collate(pairs: list[Pair], pad_id: int) -> Batch:
    """P pairs -> Batch of [2P, T]: the chosen sequences, then the rejected ones."""
    return pad_sequences([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs], pad_id)


def collate_sequences(sequences: list[Sequence], pad_id: int) -> Batch:
    """S conversations -> Batch of [S, T], padded on the right."""
    return _pad([(sequence.ids, labels_of(sequence)) for sequence in sequences], pad_id)


def labels_of(sequence: Sequence) -> list[int]:
    """The learned ids, IGNORED elsewhere and at the first token, which nothing predicts."""
    labels = [i if counted else IGNORED for i, counted in zip(sequence.ids, sequence.counted, strict=True)]
    return [IGNORED, *labels[1:]]


def pad_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (prompt, response) -> Batch of [S, T]; the responses are the labels."""
    return _pad([(prompt + response, [IGNORED] * len(prompt) + response) for prompt, response in sequences], pad_id)


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (ids, labels) -> Batch of [S, T], padded on the right, where no real token of a causal model sees it."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (ids, targets) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.tensor(targets)
    return Batch(input_ids, attention_mask, labels)
