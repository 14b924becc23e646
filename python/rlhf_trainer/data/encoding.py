"""Text and messages to token ids. The whole is the truth: a prompt and a response are parts of the tokens of the text
that they make together, never encoded apart and joined.

The response begins at the token that begins where its text does. Where there is none, as the boundary falls inside a
token of the whole, it begins where the tokens of the whole leave those of the prompt alone, as in TRL: that token is
learned, and what is left of the prompt ends before it.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RowError, UsageError
from .chat import check_prompt, check_response, front_of, plain_messages
from .rendering import NO_OPTIONS, Options, Template, common_prefix_length

PREFIX_TOKENS = (2, 8)  # of a document that serves as a prompt: Rafailov et al. (2023), appendix C.1, on IMDb
PROBE = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": "!"}]  # of a chat template


class Codec:
    """A tokenizer, its chat template at a moment, and the tokens at which generation stops.

    `ends`: the ids that the model stops at, the tokenizer's end of sequence, and what ends the assistant's turn in the
    template, for a short answer and in the data. `notes`: what a user should know about the rows that were
    read, and how many it is true of.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = (), now: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, now or datetime.now())
        self.ends = {*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        self.front = front_of(tokenizer)
        self.notes: Counter[str] = Counter()
        if tokenizer.chat_template:
            # A template may want other messages; what it refuses of the data is reported row by row. Two turns first,
            # as a whole may end with more than its turns do (Phi-3's), so that labels depend on no other row.
            with suppress(RowError, UsageError):
                encode_conversation(self, [*PROBE[0], *PROBE[1]] * 2)
            with suppress(RowError, UsageError):
                encode_pairs(self, PROBE[0], [("probe", PROBE[1])])
            self.notes.clear()


def prompt_text(codec: Codec, prompt: Any, field: str = "prompt", options: Options = NO_OPTIONS) -> str:
    """Plain text as it is; messages through the chat template, up to where the assistant's turn begins."""
    check_prompt(prompt, field)
    if isinstance(prompt, str):
        return prompt
    return codec.template.text(field, plain_messages(prompt, field), options, add_generation_prompt=True)


def encode_prompt(codec: Codec, prompt: Any, field: str = "prompt", options: Options = NO_OPTIONS) -> list[int]:
    """Token ids of a prompt, text or messages, up to where generation begins; RowError where there are none."""
    return prompt_ids(codec, prompt_text(codec, prompt, field, options), field)


def prompt_ids(codec: Codec, text: str, field: str, *, limit: int | None = None, with_front: bool = True) -> list[int]:
    """The ids of a prompt's text; RowError where there are none, or more than `limit`, max_prompt_length."""
    ids = token_ids(codec, text, field, with_front=with_front)
    if not ids:
        raise RowError(field, "has no tokens: the first token of a response is predicted from the prompt's last")
    if limit is not None and len(ids) > limit:
        raise RowError(field, f"has {len(ids)} tokens, over max_prompt_length={limit}")
    return ids


def encode_pairs(
    codec: Codec, prompt: Any, responses: Sequence[tuple[str, Any]], options: Options = NO_OPTIONS, *,
    limit: int | None = None, keep_rendering: bool = False,
) -> tuple[list[int], list[list[int]]]:  # fmt: skip
    """The tokens that a prompt has in front of all `responses` (field, response), and those of each behind them.

    A response ends with the token at which generation stops. keep_rendering: everything as a reward model reads it
    (`encode_rendering`), with what the template writes behind the end of a turn.
    """
    is_chat = not isinstance(prompt, str)
    text = prompt_text(codec, prompt, "prompt", options)
    before = prompt_ids(codec, text, "prompt", limit=limit, with_front=not (is_chat and keep_rendering))
    wholes, shared = [], 0
    for field, response in responses:
        check_response(prompt, response, field)
        if keep_rendering:
            whole = encode_rendering(codec, prompt, response, field, options)
            boundary = common_prefix_length(before, whole)
        else:
            whole, boundary = _whole_and_boundary(codec, text, prompt, response, field, options)
            whole = whole[: boundary + turn_length(codec, field, whole[boundary:], is_chat)]
            if whole[:boundary] != before:
                left = codec.tokenizer.decode(before[common_prefix_length(before, whole) :])
                codec.notes[f"the prompt's end, {left!r}, has other tokens once the response follows"] += 1
        if boundary == len(whole):
            raise RowError(field, "all tokens are masked: the tokenizer makes no token of the response")
        shared = min(shared, boundary, common_prefix_length(whole, wholes[0])) if wholes else boundary
        wholes.append(whole)
    prompt_part = wholes[0][:shared] if wholes else before
    return prompt_part, [whole[shared:] for whole in wholes]


def encode_rendering(codec: Codec, prompt: Any, response: Any, field: str, options: Options = NO_OPTIONS) -> list[int]:
    """Prompt and response as reward models read them: the tokens of transformers' apply_chat_template, all of them; or
    plain text with the end of sequence. An empty response is one that says nothing."""
    check_prompt(prompt)
    if isinstance(prompt, str):
        return with_end(codec, token_ids(codec, prompt + response, field))
    messages = [*plain_messages(prompt, "prompt"), *plain_messages(response, field)]
    return token_ids(codec, codec.template.text(field, messages, options), field, with_front=False)


def _whole_and_boundary(
    codec: Codec, before: str, prompt: Any, response: Any, field: str, options: Options
) -> tuple[list[int], int]:
    """The tokens of the text that prompt and response make, without white space behind the end of the turn, and where
    those of the response begin. before: the prompt's text."""
    if isinstance(prompt, str):
        text, place = prompt + response, len(prompt)
    else:
        messages = [*plain_messages(prompt, "prompt"), *plain_messages(response, field)]
        text, (turn,) = codec.template.conversation(field, messages, options, [len(messages) - 1], use_marks=False)
        text, place = text.rstrip(), turn.start
    ids = token_ids(codec, text, field)
    boundary = _boundary(codec, ids, offsets_of(codec, text, len(ids)), place, before)
    return (with_end(codec, ids) if isinstance(prompt, str) else ids), boundary


def encode_text(codec: Codec, text: str, field: str = "text") -> list[int]:
    """Token ids of a document, up to and with the end of sequence."""
    return with_end(codec, token_ids(codec, text, field))


def encode_conversation(
    codec: Codec, messages: Any, options: Options = NO_OPTIONS, *, assistant_only_loss: bool = True,
    last_turn_only: bool = False,
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Token ids of a whole conversation, and which of them are learned: the assistant's, in all its turns or in the
    last, or all tokens."""
    field = "messages"
    messages = plain_messages(messages, field)
    if not assistant_only_loss:
        ids = token_ids(codec, codec.template.text(field, messages, options), field)
        return ids, [True] * len(ids)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowError(field, "no message is the assistant's: there is nothing to learn")
    places = places[-1:] if last_turn_only else places
    text, turns = codec.template.conversation(field, messages, options, places, use_marks=True)
    ids = token_ids(codec, text, field)
    offsets = offsets_of(codec, text, len(ids))
    learned = [False] * len(ids)
    for before, start, end in turns:
        first = _boundary(codec, ids, offsets, start, before)
        stop = start + len(text[start:end].rstrip())
        last = next((i for i in range(first, len(ids)) if offsets[i][0] >= stop), len(ids))
        length = turn_length(codec, field, ids[first:last], is_chat=True)
        learned[first : first + length] = [True] * length
    return ids, learned


def _boundary(codec: Codec, ids: list[int], offsets: Sequence[tuple[int, int]], place: int, before: str) -> int:
    """The first token of what begins at character `place` of a text and is generated from the text `before`: the token
    that begins there; without one, the first that `before` alone does not have, as in TRL."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > place), len(ids))
    is_tiled = first < len(ids) and offsets[first][0] == place and (first == 0 or offsets[first - 1][1] == place)
    if is_tiled:
        return first
    return common_prefix_length(token_ids(codec, before, "messages"), ids)


def turn_length(codec: Codec, field: str, ids: Sequence[int], is_chat: bool) -> int:
    """How many tokens of the assistant's turn can be generated: up to and with the first at which generation stops.

    Without one, the last token ends the turn, and generation will stop at it (`Codec.ends`); RowError where it is an
    ordinary token, or there is none.
    """
    end = next((i for i, token in enumerate(ids) if token in codec.ends), None)
    if end is not None:
        return end + 1
    tokenizer = codec.tokenizer
    if is_chat and ids:
        if ids[-1] not in getattr(tokenizer, "added_tokens_decoder", {}):
            raise RowError(
                field, f"the chat template ends the assistant's turn with {tokenizer.decode(ids[-1:])!r}, an ordinary "
                "token, at which generation does not stop. Let the template write the end of sequence behind the turn, "
                "inside its {% generation %} marks if it has some",
            )  # fmt: skip
        codec.ends.add(ids[-1])
    return len(ids)


def token_ids(codec: Codec, text: str, field: str, *, with_front: bool = True) -> list[int]:
    """The ids of a text, with what the tokenizer puts in front, unless the text has it already."""
    try:
        text.encode()
        ids = codec.tokenizer(text, add_special_tokens=False).input_ids
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise RowError(field, f"is not text: {error}") from error
    has_front = ids[: len(codec.front)] == codec.front
    return ids if has_front or not with_front else codec.front + ids


def with_end(codec: Codec, ids: list[int]) -> list[int]:
    """The ids with the end of sequence behind them, unless they have an end already."""
    eos = codec.tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] in codec.ends) else [*ids, eos]


def offsets_of(codec: Codec, text: str, count: int = 0) -> list[tuple[int, int]]:
    """The characters between which each token of a text stands; of `count` tokens, those put in front are at (0, 0)."""
    tokenizer = codec.tokenizer
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} cannot tell where in a text its tokens lie: use a fast tokenizer")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return [(0, 0)] * (count - len(offsets)) + list(offsets)


def prefix_of(codec: Codec, text: str) -> str:
    """The first few tokens of a text, as text. How many is drawn by a hash of the text: the same in every run."""
    offsets, (low, high) = offsets_of(codec, text), PREFIX_TOKENS
    if len(offsets) < low:
        raise RowError("text", f"has {len(offsets)} tokens, expected at least {low} to make a prompt of")
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    length = low + draw % (high - low + 1)
    return text[: offsets[min(length, len(offsets)) - 1][1]]


def like_prompt(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt: text after text, a message of the assistant after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def is_empty(completion: Any) -> bool:
    """Whether a completion, text or messages, says nothing: no pair can be made with it."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    return isinstance(completion, str) and not completion.strip()
