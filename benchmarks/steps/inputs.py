"""The model and the pairs of preferences that training steps are measured with, both made up."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

END = "</s>"


@dataclass
class Sizes:
    """A model with Llama 3's proportions (an MLP of 3.5 times the hidden size, heads of 64, a quarter as many for
    keys and values), and its data: prompts of tokens - 1 and responses of `tokens`."""

    layers: int = 2
    hidden: int = 512
    vocab: int = 128256
    batch: int = 1  # pairs of a step
    tokens: int = 128
    steps: int = 7


def make_model(folder: Path, sizes: Sizes) -> None:
    """A random Llama and a tokenizer of as many words as its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, sizes.hidden // 64)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=7 * sizes.hidden // 2,
        num_hidden_layers=sizes.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.05,  # wider than usual: logits spread over several nats
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder, sizes.vocab)


def make_tokenizer(folder: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({END: 0} | {f"w{i}": i for i in range(1, vocab)}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END).save_pretrained(folder)


def make_pairs(path: Path, sizes: Sizes) -> None:
    """Pairs of random words, as many as `sizes.steps` steps take."""
    rng = random.Random(0)

    def text() -> str:
        """An end of sequence follows a response."""
        return " ".join(f"w{rng.randrange(1, sizes.vocab)}" for _ in range(sizes.tokens - 1))

    rows = [
        {"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(sizes.batch * sizes.steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
