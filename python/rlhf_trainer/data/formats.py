"""Rows as known data sets lay them out -> rows of plain columns.

Plain columns: prompt (text or messages), with chosen and rejected, a completion, or responses with their pairs or
scores; else messages, a whole conversation; else text, a document. Other columns are let through.
"""

import re
from collections.abc import Callable
from typing import Any

from ..config.base import RowFormat
from ..errors import RowError
from .chat import plain_messages
from .columns import expect, need, need_list, need_text

Row = dict[str, Any]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
FINAL_ANSWER = "####"
VERDICTS = ("chosen", "rejected", "tie", "unparsed")  # of `rlhf judge`, whose rows are preferences of the judge
TURN = re.compile(f"({HUMAN}|{ASSISTANT})")


def plain_row(row: Any, format: RowFormat = "auto", *, chat: bool = True) -> Row:
    """A raw row -> plain columns, or RowError. `chat`: the model talks in messages, so a transcript becomes some."""
    if not isinstance(row, dict):
        raise RowError("row", f"expected a mapping, got {row!r}")
    row = {column: value for column, value in row.items() if value is not None}
    is_judged = row.get("verdict") in VERDICTS and "flipped" in row
    judged = {column: row[column] for column in ("verdict", "flipped")} if is_judged else {}
    plain = _READERS[format_of(row) if format == "auto" else format](row, chat)
    if judged.get("verdict") == "rejected" and {"chosen", "rejected"} <= plain.keys():
        others = {column: value for column, value in plain.items() if column != "margin"}  # it is the other way round
        plain = others | {"chosen": plain["rejected"], "rejected": plain["chosen"]}
    return plain | judged


def format_of(row: Row) -> RowFormat:
    """The format that a row's columns and their contents speak for; "plain" if none does."""
    pair = [row.get("chosen"), row.get("rejected")]
    if "prompt" not in row and all(isinstance(part, str) and HUMAN in part for part in pair):
        return "hh"
    if {"info", "summaries", "choice"} <= row.keys():
        return "tldr"
    if all(isinstance(messages, list) for messages in pair) and not isinstance(row.get("prompt"), list):
        return "ultrafeedback"
    if "text" in row and not row.keys() & {"prompt", "messages", "completion", "chosen", "responses"}:
        return "imdb"
    if {"question", "answer"} <= row.keys() and not row.keys() & {"prompt", "messages", "text"}:
        return "gsm8k" if isinstance(row["answer"], str) and FINAL_ANSWER in row["answer"] else "plain"
    return "plain"


def _from_transcripts(row: Row, chat: bool) -> Row:
    """Anthropic HH: two transcripts, equal up to the assistant's last turn, which is the response."""
    turns = {}
    for field, transcript in (("chosen", need_text(row, "chosen")), ("rejected", need_text(row, "rejected"))):
        if not transcript.startswith(HUMAN):
            raise RowError(field, f"expected a transcript that begins with {HUMAN!r}, got {transcript[:30]!r}")
        _, *turns[field] = TURN.split(transcript)  # marks, and what follows each of them
        if turns[field][-2] != ASSISTANT:
            raise RowError(field, "the transcript ends with the human's turn, so there is no response")
    *prompt, chosen = turns["chosen"]
    *other, rejected = turns["rejected"]
    if prompt != other:
        raise RowError("rejected", "the transcript differs from 'chosen' before the last response: no common prompt")
    if not chat:
        return {"prompt": "".join(prompt), "chosen": chosen, "rejected": rejected}
    messages = [
        {"role": "user" if mark == HUMAN else "assistant", "content": content.strip()}
        for mark, content in zip(prompt[:-1:2], prompt[1::2], strict=True)
    ]
    return {"prompt": messages, "chosen": _answer(chosen), "rejected": _answer(rejected)}


def _from_word_problems(row: Row, chat: bool) -> Row:
    """GSM8K: a question and a worked answer, whose last line gives the result after ####."""
    question, solution = need_text(row, "question").strip(), need_text(row, "answer").strip()
    _, mark, result = solution.rpartition(FINAL_ANSWER)
    if not mark or not result.strip():
        raise RowError("answer", f"expected a solution with its result behind {FINAL_ANSWER}, got {solution[-30:]!r}")
    if chat:
        texts = {"prompt": [{"role": "user", "content": question}], "completion": _answer(solution)}
    else:
        texts = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {solution}"}
    return {**row, **texts, "ground_truth": result.strip()}


def _answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content.strip()}]


def _from_summaries(row: Row, _chat: bool) -> Row:
    """OpenAI's comparisons of two summaries of a post on Reddit, for a prompt that asks for one."""
    info = expect("info", need(row, "info"), dict, "a mapping")
    subreddit, title, post = (expect(f"info.{k}", info.get(k), str, "text") for k in ("subreddit", "title", "post"))
    texts = []
    for i, summary in enumerate(need_list(row, "summaries")):
        summary = expect(f"summaries[{i}]", summary, dict, "a mapping")
        texts.append(expect(f"summaries[{i}].text", summary.get("text"), str, "text"))
    choice = need(row, "choice")
    if len(texts) != 2 or choice not in (0, 1):
        raise RowError("choice", f"expected 0 or 1, one of 2 summaries, got {choice!r} of {len(texts)}")
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    chosen, rejected = (" " + texts[place].strip() for place in (choice, 1 - choice))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _from_conversations(row: Row, _chat: bool) -> Row:
    """UltraFeedback: two whole conversations, equal up to the responses."""
    chosen, rejected = (plain_messages(need_list(row, column), column) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise RowError("chosen", "expected a conversation that begins with the prompt, as 'rejected' does")
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


_READERS: dict[str, Callable[[Row, bool], Row]] = {
    "plain": lambda row, _chat: row,
    "hh": _from_transcripts,
    "tldr": _from_summaries,
    "imdb": lambda row, _chat: {"text": need_text(row, "text")},  # the sentiment is not for the model to see
    "ultrafeedback": _from_conversations,
    "gsm8k": _from_word_problems,
}
