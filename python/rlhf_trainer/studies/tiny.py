"""What studies share: tiny models of a language of whole words, and an annotator."""

import math
import random
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """One token a word: the first of `words` ends a text, and pads. `special`: more special tokens, by their names."""
    end, *_ = words
    level = WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.get("unk_token", end))
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, padding_side="left", **special
    )


def tiny_gpt2(vocabulary: int, positions: int, *, width: int, layers: int, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 without dropout, as it is before any training; token 0 ends a text. `options`: more of GPT2Config's."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def prefers_first(first: float, second: float, rng: random.Random) -> bool:
    """A Bradley-Terry annotator's choice between two rewards: the first wins with probability sigma(first - second)."""
    return rng.random() < 1.0 / (1.0 + math.exp(second - first))
