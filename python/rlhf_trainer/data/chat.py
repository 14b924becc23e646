"""Messages as data sets write them, and the chat templates that turn them into text."""

import itertools
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import RowError, UsageError, kind
from .columns import expect

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANY_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
MARKED = "training"  # the name of a tokenizer's template with marks, beside the default one without
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content
PROBES = 64  # tokens that are tried to make a text of
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# What the assistant writes is marked, for masks: its content and the token that ends its turn, but neither the header,
# which generation starts behind, nor the line break behind the turn, which generation never reaches. White space at
# the rim of its content is dropped: at the front, it might fuse with the header's line break into another token than
# the one that generation starts from.
# Its lines are joined without their indentation, so that they make no white space of their own.
CHATML_LINES = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8").splitlines()
CHATML = "".join(map(str.strip, CHATML_LINES)).replace(r"\n", "\n")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> int:
    """Gives the tokenizer the template "chatml", or that of a Jinja file; returns how many tokens it gained.

    "chatml" brings its two tokens where they are missing, and ends a turn, hence a response, with one of them. A
    template that leaves out the token which the tokenizer puts in front of every text is made to write it: whoever
    renders a conversation, with this package or without, then has it. A template with {% generation %} marks becomes
    two, since Jinja knows no such tag: the default one without, and MARKED with them.
    """
    before = len(tokenizer)
    if name_or_path == "chatml":
        tokenizer.add_special_tokens(
            {"eos_token": CHATML_TOKENS[1], "extra_special_tokens": [CHATML_TOKENS[0]]},
            replace_extra_special_tokens=False,
        )
        template = CHATML
    else:
        try:
            template = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"chat_template_path: expected chatml or a Jinja file, got {name_or_path!r}: {error}"
            ) from error
    tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(f"chat_template_path: {name_or_path}, line {error.lineno}: {error.message}") from error
    except TemplateError:
        text = None  # a template may want other messages than these; what it refuses of the data is reported row by row
    bos = tokenizer.bos_token
    lacks_bos = bos and "bos_token" not in template and not (text or "").startswith(bos)
    if lacks_bos and tokenizer.bos_token_id in front_of(tokenizer):
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template
    if GENERATION_MARK.search(template):
        # An `if` in place of a mark, so that the white space around it is cut as it was.
        plain = ANY_MARK.sub(r"{%\1 if true %}{% endif \2%}", template)
        tokenizer.chat_template = {"default": plain, MARKED: template}
    return len(tokenizer) - before


def front_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of every text."""
    known = range(min(len(tokenizer), PROBES))
    for word in itertools.chain(["a"], (tokenizer.decode([i], skip_special_tokens=True) for i in known)):
        bare, ids = tokenizer(word, add_special_tokens=False).input_ids, tokenizer(word).input_ids
        if bare:  # some tokenizers do not know "a"
            return next((ids[:i] for i in range(len(ids)) if ids[i : i + len(bare)] == bare), [])
    return []


def plain_messages(messages: Any, field: str) -> list[dict[str, Any]]:
    """Checked messages, as templates take them: content is text, arguments of tool calls are mappings.

    A content of text parts becomes one text; None, which Parquet writes for keys that a row does not have, is dropped.
    """
    if not expect(field, messages, list, "a list of messages"):
        raise RowError(field, "the list of messages is empty")
    return [_plain_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Any, field: str) -> dict[str, Any]:
    expect(field, message, dict, "{'role': ..., 'content': ...}")
    message = {key: value for key, value in message.items() if value is not None}
    expect(f"{field}.role", message.get("role"), str, "text")
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _plain_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(_text_part(part, f"{field}.content[{i}]") for i, part in enumerate(content))
    else:
        expect(f"{field}.content", content, str, "text")
    return message


def _text_part(part: Any, field: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise RowError(field, f"expected {{'type': 'text', 'text': ...}}, got {kind(part)}; only text is read")
    return part["text"]


def _plain_call(call: Any, field: str) -> dict[str, Any]:
    """{"function": {"name", "arguments"}}; arguments that are JSON text, as OpenAI's are, decoded."""
    call = without_none(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(field, f"expected {{'function': {{'name': ..., 'arguments': ...}}}}, got {kind(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    expect(f"{field}.function.arguments", arguments, dict, "a mapping, or JSON text of one")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the row passes to the chat template: its `tools`, and its `chat_template_kwargs` by their names."""
    options = {}
    for column, type_ in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise RowError(column, f"not JSON: {error}") from error
        if value is None:
            continue
        value = without_none(expect(column, value, type_, f"a {type_.__name__}, or JSON text of one"))
        if column == "tools":
            value = {"tools": value} if value else {}
        options |= value
    return options


def without_none(value: Any) -> Any:
    """The value without the None that Parquet writes for keys that a mapping does not have, however deep."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def is_blank(message: dict[str, Any]) -> bool:
    """Whether the assistant says nothing in it."""
    return not message["content"].strip() and not message.get("tool_calls")


def check_prompt(prompt: Any, field: str = "prompt") -> None:
    """A prompt is text or messages."""
    if not isinstance(expect(field, prompt, str | list, "text or a list of messages"), str):
        plain_messages(prompt, field)


def check_response(prompt: Any, response: Any, field: str) -> None:
    """A response is text after text, one message of the assistant after messages, and not empty."""
    type_, expected = (str, "text") if isinstance(prompt, str) else (list, "a list of messages")
    expect(field, response, type_, f"{expected}, as in 'prompt'")
    messages = [{"role": "assistant", "content": response}]
    if not isinstance(response, str):
        messages = plain_messages(response, field)
    if is_blank(messages[-1]):
        raise RowError(field, "the response is empty")
    if messages[-1]["role"] != "assistant":
        raise RowError(field, f"the last message must be the assistant's, got role {messages[-1]['role']!r}")
    if len(messages) > 1:  # what the user says in between would be learned as if the model had written it
        raise RowError(field, f"expected one message, what the assistant answers, got {len(messages)}")
