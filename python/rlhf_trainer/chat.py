"""From a row of text or chat messages to the text of its prompt and the text of its response."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


class RowError(ValueError):
    """One row cannot be used; `field` says where."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    """Plain text as it is; messages through the chat template, up to where the assistant's turn begins."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise RowError("prompt", f"expected text or a list of messages, got {type(prompt).__name__}")
    check_messages("prompt", prompt)
    return _render(tokenizer, "prompt", prompt, add_generation_prompt=True)


def response_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any, field: str) -> str:
    """What the model should write after `prompt_text`, up to and with the token that ends its turn.

    Plain text: the response and the end-of-sequence token. Messages: what the template renders after the prompt,
    without the white space it puts behind the end of the turn (generation stops before that, so it is never the
    model's own).
    """
    if isinstance(prompt, str) != isinstance(response, str) or not isinstance(response, str | list):
        kind = "text" if isinstance(prompt, str) else "a list of messages"
        raise RowError(field, f"expected {kind}, as in 'prompt', got {_kind(response)}")
    eos = tokenizer.eos_token or ""
    if isinstance(response, str):
        if not response.strip():
            raise RowError(field, "the response is empty")
        return response + eos
    check_messages(field, response)
    if not response[-1]["content"].strip():
        raise RowError(field, "the response is empty")
    if response[-1]["role"] != "assistant":
        raise RowError(field, f"the last message must be the assistant's, got role {response[-1]['role']!r}")
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


def check_messages(field: str, messages: list[Any]) -> None:
    """Messages are a list, not empty, of {"role": text, "content": text}."""
    if not messages:
        raise RowError(field, "the list of messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"{field}[{i}]", f"expected {{'role': ..., 'content': ...}}, got {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RowError(f"{field}[{i}].{key}", f"expected text, got {_kind(message.get(key))}")


def _render(
    tokenizer: PreTrainedTokenizerBase, field: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise RowError(field, "holds chat messages, but the tokenizer has no chat template; use plain text or set one")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise RowError(field, f"the chat template refuses these messages: {error}") from error


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")
