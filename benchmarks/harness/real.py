"""Real models, as `make real` fetches them, and text that they read: what random numbers of the same sizes hide."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.peers import ROOT

MODELS = {"SmolLM2 135M": "smollm2-135m-instruct", "Gemma 3 270M": "gemma-3-270m"}
PAIRS = ROOT / "tests/real/demo_pairs.jsonl"  # questions, each with a short and a long answer


def folder_of(model: str) -> Path:
    folder = ROOT / "build/real/models" / MODELS[model]
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: `make bench` and `make real` fetch it")
    return folder


def real_pairs(at_once: int = 3) -> list[dict[str, str]]:
    """Pairs of plain text, each made of so many of PAIRS."""
    columns = ("prompt", "chosen", "rejected")
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    texts = [{name: row[name][0]["content"] for name in columns} for row in rows]
    parts = [texts[k : k + at_once] for k in range(0, len(texts) - at_once + 1, at_once)]
    return [{name: " " + " ".join(text[name] for text in part) for name in columns} for part in parts]


class OwnHidden(LinearLogprobs):
    """The model's own hidden states of such text, its head, and the text's next tokens."""

    def make_inputs(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = folder_of(self.model.partition(",")[0])
        text = " ".join(text for pair in real_pairs() for text in pair.values())
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, : self.n + 1]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()
        with torch.no_grad():
            self.hidden = model.base_model(ids[:, :-1]).last_hidden_state[0].requires_grad_()
        self.weight = model.get_output_embeddings().weight.detach().requires_grad_(not self.frozen)
        self.targets = ids[0, 1:]


def head_sizes(model: str) -> tuple[int, int]:
    """D and V."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder_of(model))
    return config.hidden_size, config.vocab_size
