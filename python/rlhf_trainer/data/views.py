"""Examples as a person, or a program, looks at them: exactly the tokens that will be trained, and which are learned."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .batches import IGNORED, labels_of
from .examples import Group, Prompt, TokenSequence

LEARNED = ("\x1b[32m", "\x1b[0m")  # in green, where there are colours
ENDS_SHOWN = 60  # tokens at each end of a long piece that are shown of it
Example = TokenSequence | Group | Prompt


class Piece(NamedTuple):
    """Token ids, and labels: the ids where they are learned, IGNORED elsewhere."""

    name: str
    ids: list[int]
    labels: list[int]


def pieces_of(example: Example) -> list[Piece]:
    """A conversation is one piece; of prompts and responses, the prompt is the first."""
    if isinstance(example, TokenSequence):
        return [Piece("conversation", example.ids, labels_of(example))]
    prompt = example.ids if isinstance(example, Prompt) else example.prompt
    pieces = [Piece("prompt", prompt, [IGNORED] * len(prompt))]
    if isinstance(example, Group):
        names: dict[int, str] = {}
        if len(example.pairs) == 1:
            ((better, worse),) = example.pairs
            names = {worse: "rejected", better: "chosen"}
        for i, ids in enumerate(example.responses):
            # A reward is read at the last token, of which the loss is made; nothing is learned token by token.
            labels = [IGNORED] * (len(ids) - 1) + ids[-1:] if example.is_rewarded else ids
            pieces.append(Piece(names.get(i, f"response {i}"), ids, labels))
    return pieces


def as_json(example: Example) -> str:
    """sft: {"row", "input_ids", "labels"}; dpo, reward: {"row", "prompt_ids", "responses": [{"input_ids",
    "labels"}]}, each of the response alone; prompts: {"row", "prompt_ids"}."""
    first, *others = pieces_of(example)
    content: dict[str, Any] = {"row": example.row}
    if isinstance(example, TokenSequence):
        content |= {"input_ids": first.ids, "labels": first.labels}
    else:
        content["prompt_ids"] = first.ids
        if others:
            content["responses"] = [{"input_ids": piece.ids, "labels": piece.labels} for piece in others]
    return json.dumps(content)


def as_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, colour: bool, ends: int | None = None) -> str:
    """The example token by token: a bar between two tokens, learned ones in green, or in brackets without colour; of a
    piece with more than twice `ends` tokens, only these at its two ends."""
    lines = []
    for piece in pieces_of(example):
        learned = sum(label != IGNORED for label in piece.labels)
        head = f"row {example.row}, {piece.name}: {len(piece.ids)} tokens"
        lines.append(head + (f", {learned} learned" if learned else ""))
        tokens = [
            token_text(tokenizer, i, label != IGNORED, colour)
            for i, label in zip(piece.ids, piece.labels, strict=True)
        ]  # fmt: skip
        if ends is not None and len(tokens) > 2 * ends:
            tokens = [*tokens[:ends], f" ... {len(tokens) - 2 * ends} more ... ", *tokens[-ends:]]
        lines.append("  " + "|".join(tokens))
    if isinstance(example, Group) and len(example.pairs) > 1:
        lines.append("  pairs: " + ", ".join(f"{better} before {worse}" for better, worse in example.pairs))
    return "\n".join(lines)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int, learned: bool, colour: bool) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" in text or not text:  # a part of a character; a space that decoding drops
        text = str(tokenizer.convert_ids_to_tokens(token)).replace("\u2581", " ")
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    if not learned:
        return text
    return text.join(LEARNED) if colour else f"[{text}]"


def has_colours() -> bool:
    """Whether standard output is a terminal that shows colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def first_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int, colour: bool) -> str:
    """The first examples as they will be trained, for the start of a run."""
    marks = "in green" if colour else "in [brackets]"
    title = f"the first {min(count, len(examples))} rows as they are trained, what is learned {marks}:"
    shown = [as_text(example, tokenizer, colour=colour, ends=ENDS_SHOWN) for example in examples[:count]]
    return "\n".join([title, *shown])
