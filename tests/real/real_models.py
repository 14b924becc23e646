"""The real models, what their text must look like, and what transformers alone makes of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[2] / "build" / "real" / "models"
IGNORED = -100
END = "<|im_end|>"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class RealModel:
    name: str
    flags: tuple[str, ...]  # which give it a chat template, where it has none
    front: str  # of every conversation
    knows_end: bool  # False: the template's tokens are new to it, and unlikely until many steps have raised them

    @property
    def path(self) -> Path:
        return FOLDER / self.name

    def rendered(self, messages: Messages) -> str:
        """The text of a conversation, whole; written here, and not by a template."""
        return self.front + "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in messages)


SMOLLM2 = RealModel(
    "smollm2-135m-instruct",
    (),
    f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n",
    True,
)
GEMMA3 = RealModel("gemma-3-270m", ("--chat_template_path", "chatml"), "<bos>", False)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Short, so that a base model learns in a few steps where a turn ends; one in two turns, and of all kinds of characters.
CONVERSATIONS = [
    [user("What is the capital of France?"), assistant("Paris.")],
    [user("Name a fruit."), assistant("An apple."), user("Another one, please."), assistant("A pear.")],
    [user("2+2="), assistant("4")],
    [user("Wie heißt du?\n\n(auf Deutsch)"), assistant("Ich heiße Ada. 🙂")],
]
PAIRS = [
    ([user("What is the capital of Italy?")], "Rome.", "It is a question that many people ask, and there are cities."),
    ([user("Is the sea salty?")], "Yes.", "Well, the sea is large.\n\nIt has water."),
    ([*CONVERSATIONS[0], user("And of Spain?")], "Madrid.", "France and Spain are countries."),
]
PROMPTS = [[user("What is the capital of France?")], [user("Name a fruit.")]]


def rows_of(command: str) -> list[dict[str, Any]]:
    if command == "sft":
        return [{"messages": messages} for messages in CONVERSATIONS]
    if command in ("dpo", "reward"):
        return [{"prompt": p, "chosen": [assistant(c)], "rejected": [assistant(r)]} for p, c, r in PAIRS]
    return [{"prompt": prompt} for prompt in PROMPTS]


def labelled(
    model: RealModel, tokenizer: PreTrainedTokenizerBase, messages: Messages, *, last_turn_only: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels: what the assistant says and the token that ends its turn."""
    text = model.rendered(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, place = [], len(model.front)
    for message in messages:
        start = place + len(f"<|im_start|>{message['role']}\n")
        end = start + len(message["content"] + END)
        if message["role"] == "assistant":
            spans.append((start, end))
        place = end + 1  # the line break
    assert place == len(text)
    spans = spans[-1:] if last_turn_only else spans
    labels = [
        token if any(first <= start and end <= last for first, last in spans) else IGNORED
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def token_logps(model: PreTrainedModel, rows: Iterable[tuple[list[int], list[int]]]) -> list[Tensor]:
    """log p of the labelled tokens of each row, fp64, from the model's own logits; a row at a time, unpadded."""
    results = []
    for ids, labels in rows:
        targets = torch.tensor(labels[1:])
        learned = targets != IGNORED
        logits = model(torch.tensor([ids])).logits[0, :-1][learned]
        results.append(logits.log_softmax(-1).double().gather(-1, targets[learned][:, None])[:, 0])
    return results


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
