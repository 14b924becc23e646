"""Conversations to text through the chat template, and which parts of the text the assistant writes.

Where a template has no {% generation %} marks, a turn of the assistant is what the whole has between the conversation
before it, with the header that generation starts behind, and the conversation up to and with it: the template must
render both as beginnings of the whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import RowError
from .chat import GENERATION_MARK, MARKED, THOUGHTS, is_blank

DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
EXCERPT = 40
Options = Mapping[str, Any]  # what a row passes to the template: tools, chat_template_kwargs
NO_OPTIONS: Options = MappingProxyType({})
Messages = Sequence[dict[str, Any]]


class Turn(NamedTuple):
    """A turn of the assistant within the text of a conversation: characters `start` to `end`, which may have what the
    template writes behind the end of the turn at its own end. `before` is the text that generation starts from."""

    before: str
    start: int
    end: int


class Template:
    """A tokenizer's chat template. `now` is the moment that it takes for the present."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, now: datetime) -> None:
        self.tokenizer, self.now = tokenizer, now

    def source(self, field: str, options: Options) -> str:
        """The template's own text, with dates as they are at `now`; RowError where there is none."""
        templates = self.tokenizer.chat_template
        if not templates:
            raise RowError(
                field, "holds chat messages, but the tokenizer has no chat template; use plain text or set one with "
                "--chat_template_path (chatml, or a Jinja file)",
            )  # fmt: skip
        if isinstance(templates, dict) and MARKED in templates:
            template = templates[MARKED]
        else:
            try:
                template = self.tokenizer.get_chat_template(tools=options.get("tools"))
            except ValueError as error:
                raise RowError(
                    field, f"the tokenizer has several chat templates, {', '.join(templates)}, and none is called "
                    "default: pass one of them as a file, --chat_template_path",
                ) from error  # fmt: skip
        return DATE.sub(lambda call: json.dumps(self.now.strftime(call[2])), template)

    def render(self, field: str, messages: Messages, options: Options, *, add_generation_prompt: bool = False) -> str:
        return self._render(field, messages, options, add_generation_prompt=add_generation_prompt)[0]

    def _render(
        self, field: str, messages: Messages, options: Options, **how: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, with return_assistant_tokens_mask, the marked parts of it."""
        template = self.source(field, options)
        settings = {**self.tokenizer.special_tokens_map, **options, "add_generation_prompt": False, **how}
        try:
            (text,), marks = render_jinja_template([list(messages)], chat_template=template, **settings)
        except TemplateError as error:
            raise RowError(field, f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise RowError(
                field, f"the chat template fails on these messages, {type(error).__name__}: {error}. It may not know "
                "tool calls, or keys that this row has",
            ) from error  # fmt: skip
        return text, marks[0] if marks else []

    def text(self, field: str, messages: Messages, options: Options, *, add_generation_prompt: bool = False) -> str:
        """The text of the messages, or that which generation of an answer starts from; RowError where the template
        leaves out tools that the row offers, or calls of them."""
        text = self.render(field, messages, options, add_generation_prompt=add_generation_prompt)
        self._check_tools(text, field, messages, options, add_generation_prompt=add_generation_prompt)
        return text

    def conversation(
        self, field: str, messages: Messages, options: Options, places: Sequence[int], *, use_marks: bool
    ) -> tuple[str, list[Turn]]:
        """The text of the whole, and the assistant's turns that stand at `places` among the messages."""
        marked = use_marks and GENERATION_MARK.search(self.source(field, options)) is not None
        text, marks = self._render(field, messages, options, return_assistant_tokens_mask=marked)
        self._check_tools(text, field, messages, options)
        if marked:
            turns = self._marked_turns(field, messages, options, places, text, marks)
        else:
            turns = [self._turn_at(place, field, messages, options, text) for place in places]
        if len(turns) == len(places):  # a template may mark parts of a turn one by one
            for place, turn in zip(places, turns, strict=True):
                check_written(text[turn.start : turn.end], f"{field}[{place}]", messages[place])
        return text, turns

    def _marked_turns(
        self, field: str, messages: Messages, options: Options, places: Sequence[int], text: str,
        marks: Sequence[tuple[int, int]],
    ) -> list[Turn]:  # fmt: skip
        if sum(message["role"] == "assistant" for message in messages) > len(places):  # the last turn alone
            before = self._beginning(
                field, messages[: places[-1]], options, text, "earlier turns differently once the last one follows"
            )
            marks = [mark for mark in marks if mark[0] >= len(before)]
        turns: list[Turn] = []
        for start, end in marks:
            if turns and start == turns[-1].end:  # a turn in parts, the end apart from the content, say
                turns[-1] = turns[-1]._replace(end=end)
            elif start < end:
                turns.append(Turn(text[:start], start, end))
        if len(turns) < len(places):
            raise RowError(field, f"{{% generation %}} marks {len(turns)} of {len(places)} turns of the assistant")
        return turns

    def _turn_at(self, place: int, field: str, messages: Messages, options: Options, text: str) -> Turn:
        """The turn of the assistant that is message number `place`."""
        if place == 0:
            raise RowError(
                field, "the assistant begins, so there is no prompt to tell its turn from; a template with "
                "{% generation %} marks could",
            )  # fmt: skip
        advice = (
            "the conversation before a turn of the assistant differently once more follows, so what was learned would "
            "not be what is generated. Pass --last_turn_only to learn the last turn alone, or a template of your own"
        )
        before = self.render(field, messages[:place], options, add_generation_prompt=True)
        start = common_prefix_length(before, text)
        if start < len(before):  # the header may open thoughts that a finished turn does not have
            self._beginning(field, messages[:place], options, text, advice)
            # Thoughts and content may begin alike, "<think>" and "<answer>": another content shows where it begins.
            other = "," if messages[place]["content"].lstrip().startswith(".") else "."
            stand_in = [*messages[:place], {"role": "assistant", "content": other}]
            start = min(start, common_prefix_length(self.render(field, stand_in, options), text))
        if place == len(messages) - 1:
            return Turn(before, start, len(text))
        up_to_turn = self._beginning(field, messages[: place + 1], options, text, advice)
        return Turn(before, start, len(up_to_turn))

    def _check_tools(self, text: str, field: str, messages: Messages, options: Options, **how: bool) -> None:
        """RowError where the template leaves out tools that a row offers, or calls of them in its messages."""
        if options.get("tools") and text == self.render(field, messages, {**options, "tools": []}, **how):
            raise RowError("tools", "the chat template does not write them: the text that it makes is the same without")
        if not any("tool_calls" in message for message in messages):
            return
        without, silent = None, [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        with suppress(RowError):  # a template that makes no text without them reads them
            without = self.render(field, silent, options, **how)
        if text == without:
            raise RowError(
                f"{field}.tool_calls", "the chat template does not write tool calls: its text is the same without"
            )

    def _beginning(self, field: str, messages: Messages, options: Options, text: str, problem: str) -> str:
        """The text of the first messages, which must be how `text`, that of the whole, begins. An end of sequence that
        the template writes behind the last message alone, as Phi-3's does, is no part of it."""
        part = self.render(field, messages, options)
        if not text.startswith(part):
            part = part.removesuffix(self.tokenizer.eos_token or "")
        if not text.startswith(part):
            at = common_prefix_length(part, text)
            apart, whole = (repr(each[max(0, at - EXCERPT) : at + EXCERPT]) for each in (part, text))
            raise RowError(
                field, f"the chat template renders {problem}; by itself the beginning is ...{apart}..., in the "
                f"whole it is ...{whole}...",
            )  # fmt: skip
        return part


def check_written(text: str, field: str, message: dict[str, Any]) -> None:
    """RowError unless the text of the assistant's turn has all that its message says; white space does not count."""
    if is_blank(message):
        raise RowError(f"{field}.content", "the assistant's turn is empty")
    squeezed = "".join(text.split())
    for key in ("content", *THOUGHTS):
        part = message.get(key)
        if isinstance(part, str) and "".join(part.split()) not in squeezed:
            raise RowError(
                f"{field}.{key}", f"the chat template does not write it as it is: it makes {text[:EXCERPT]!r}... of "
                f"{part[:EXCERPT]!r}.... A template that leaves thoughts out cannot teach them: pass one of your own, "
                "--chat_template_path",
            )  # fmt: skip


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two sequences share at their beginnings."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])
