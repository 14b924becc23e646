"""Rows of text or chat messages: the text of a prompt and of a response, or the tokens of a conversation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import RowError, UsageError, kind

PREFIX_TOKENS = (2, 8)  # of a document that serves as a prompt: Rafailov et al. (2023), appendix C.1, on IMDb
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# What the assistant writes is marked, for masks: its content and the token that ends its turn, but neither the header,
# which generation starts behind, nor the line break behind the turn, which generation never reaches. White space at
# the rim of its content is dropped: at the front, it might fuse with the header's line break into another token than
# the one that generation starts from.
CHATML = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}"
    "{% for message in messages %}"
    "{% if loop.index0 >= first and message.role != ['user', 'assistant'][(loop.index0 - first) % 2] %}"
    "{{ raise_exception('after an optional system message, roles must alternate user, assistant, user, ...; message '"
    " ~ loop.index0 ~ ' has role ' ~ message.role) }}"
    "{% endif %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content | trim ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message.content ~ '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{% if messages[-1].role != 'user' %}"
    "{{ raise_exception('a prompt must end with a message of the user, not of role ' ~ messages[-1].role) }}"
    "{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> int:
    """Gives the tokenizer the template "chatml", or that of a Jinja file; returns how many tokens it gained.

    "chatml" brings its two tokens where they are missing, and ends a turn, hence a response, with one of them.
    """
    if name_or_path == "chatml":
        before = len(tokenizer)
        tokenizer.add_special_tokens(
            {"eos_token": CHATML_TOKENS[1], "extra_special_tokens": [CHATML_TOKENS[0]]},
            replace_extra_special_tokens=False,
        )
        tokenizer.chat_template = CHATML
        return len(tokenizer) - before
    try:
        tokenizer.chat_template = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"chat_template_path: expected chatml or a Jinja file, got {name_or_path!r}: {error}"
        ) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(f"chat_template_path: {name_or_path}, line {error.lineno}: {error.message}") from error
    except TemplateError:
        pass  # a template may want other messages than these; what it refuses of the data is reported row by row
    return 0


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Any,
    *,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them are learned: the assistant's, in all its turns or in the
    last, or all tokens.

    The assistant's are those that the chat template puts between {% generation %} and {% endgeneration %}.
    """
    field = "messages"
    if not isinstance(messages, list):
        raise RowError(field, f"expected a list of messages, got {kind(messages)}")
    check_messages(field, messages)
    if not assistant_only_loss:
        ids = _tokenize(tokenizer, field, messages)["input_ids"]
        return ids, [True] * len(ids)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowError(field, "no message is the assistant's: there is nothing to learn")
    _check_marks(tokenizer, field)
    encoded = _tokenize(
        tokenizer, field, messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
    )
    ids, counted = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
    if last_turn_only and len(places) > 1:
        before, whole = (_render(tokenizer, field, part, False) for part in (messages[: places[-1]], messages))
        if not whole.startswith(before):
            raise RowError(field, "the chat template renders earlier turns differently once the last one follows")
        starts = (start for start, _ in encoded["offset_mapping"])
        counted = [mark and start >= len(before) for mark, start in zip(counted, starts, strict=True)]
    expected = 1 if last_turn_only else len(places)
    marked = sum(mark and not previous for previous, mark in zip([False, *counted], counted, strict=False))
    if marked < expected:  # by the template, or by a tokenizer that drops a character where a mark begins
        raise RowError(field, f"{{% generation %}} marks {marked} of {expected} turns of the assistant")
    return ids, counted


def _check_marks(tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """UsageError where this tokenizer and its template cannot mark what the assistant writes, in any row."""
    need_fast(tokenizer)
    if not GENERATION_MARK.search(_template_of(tokenizer, field)):
        raise UsageError(
            "the tokenizer's chat template does not say what the assistant writes: put {% generation %} and "
            "{% endgeneration %} around it in a file of your own and pass that as chat_template_path, or pass "
            "chat_template_path: chatml, or assistant_only_loss: false to learn the whole conversation"
        )


def need_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} cannot tell where in a text its tokens lie: use a fast tokenizer")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, field: str = "prompt") -> str:
    """Plain text as it is; messages through the chat template, up to where the assistant's turn begins."""
    check_prompt(prompt, field)
    if isinstance(prompt, str):
        return prompt
    return _render(tokenizer, field, prompt, add_generation_prompt=True)


def response_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any, field: str) -> str:
    """The text that the model should write after `prompt_text`, up to and with the token that ends its turn.

    Plain text: the response and the end-of-sequence token. Messages: what the template renders after the prompt,
    without the white space it puts behind the end of the turn (generation stops before that, so it is never the
    model's own).
    """
    check_response(prompt, response, field)
    eos = tokenizer.eos_token or ""
    if isinstance(response, str):
        return response + eos
    before = prompt_text(tokenizer, prompt)
    whole = _render(tokenizer, field, [*prompt, *response], add_generation_prompt=False)
    if not whole.startswith(before):
        raise RowError(
            field,
            "the chat template renders the prompt differently once the response follows, so the two cannot be told "
            f"apart; the prompt ends with {before[-60:]!r}, the conversation has {whole[: len(before)][-60:]!r} there",
        )
    text = whole[len(before) :]
    return text.rstrip() if eos and text.rstrip().endswith(eos) else text


def prefix_of(tokenizer: PreTrainedTokenizerBase, text: str, tokens: tuple[int, int] = PREFIX_TOKENS) -> str:
    """The first few tokens of a text, as text. How many is drawn by a hash of the text: the same in every run."""
    need_fast(tokenizer)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    low, high = tokens
    if len(offsets) < low:
        raise RowError("text", f"has {len(offsets)} tokens, expected at least {low} to make a prompt of")
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    length = low + draw % (high - low + 1)
    return text[: offsets[min(length, len(offsets)) - 1][1]]


def check_prompt(prompt: Any, field: str = "prompt") -> None:
    """A prompt is text or messages."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list):
        raise RowError(field, f"expected text or a list of messages, got {type(prompt).__name__}")
    check_messages(field, prompt)


def check_response(prompt: Any, response: Any, field: str) -> None:
    """A response is text after text, one message of the assistant after messages, and not empty."""
    if isinstance(prompt, str) != isinstance(response, str) or not isinstance(response, str | list):
        expected = "text" if isinstance(prompt, str) else "a list of messages"
        raise RowError(field, f"expected {expected}, as in 'prompt', got {kind(response)}")
    if isinstance(response, list):
        check_messages(field, response)
    if not (response if isinstance(response, str) else response[-1]["content"]).strip():
        raise RowError(field, "the response is empty")
    if isinstance(response, str):
        return
    if response[-1]["role"] != "assistant":
        raise RowError(field, f"the last message must be the assistant's, got role {response[-1]['role']!r}")
    if len(response) > 1:  # what the user says in between would be learned as if the model had written it
        raise RowError(field, f"expected one message, what the assistant answers, got {len(response)}")


def check_messages(field: str, messages: list[Any]) -> None:
    """Messages are a list, not empty, of {"role": text, "content": text}."""
    if not messages:
        raise RowError(field, "the list of messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"{field}[{i}]", f"expected {{'role': ..., 'content': ...}}, got {kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RowError(f"{field}[{i}].{key}", f"expected text, got {kind(message.get(key))}")


def _render(
    tokenizer: PreTrainedTokenizerBase, field: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    _template_of(tokenizer, field)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise _refused(field, error) from error


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, field: str, messages: list[dict[str, str]], **options: Any
) -> Mapping[str, Any]:
    _template_of(tokenizer, field)
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except TemplateError as error:
        raise _refused(field, error) from error


def _template_of(tokenizer: PreTrainedTokenizerBase, field: str) -> str:
    if not tokenizer.chat_template:
        raise RowError(field, "holds chat messages, but the tokenizer has no chat template; use plain text or set one")
    return tokenizer.get_chat_template()


def _refused(field: str, error: TemplateError) -> RowError:
    return RowError(field, f"the chat template refuses these messages: {error}")
