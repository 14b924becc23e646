"""The language of `rlhf frontier`, small enough that every completion can be counted, and the reward hidden in it.

A prompt is three words, such as "sun stone rain"; a completion goes on with up to four: "moon wind tree". The model
knows the ten words and the end, eleven tokens, and has four steps: whatever it does, it has then written one of
10^0 + 10^1 + 10^2 + 10^3 completions that ended, or one of the 10^4 of four words, which ended or not.

The hidden reward of a completion y_1 ... y_n of a prompt x_1 x_2 x_3, in nats, is a sum of what each word is worth,
what it is worth with the prompt's second word, and what it is worth behind the word before it; a word that the
completion had before costs REPEATED:

    r(x, y) = sum_i LIKED[y_i] + SUITS[x_2][y_i] + FOLLOWS[y_{i-1}][y_i] + REPEATED [y_i in y_1 ... y_{i-1}],  y_0 = x_3

An empty completion has the reward NO_ANSWER. All tables are drawn, once for all. The language hardly ever
repeats a word, so few pairs hardly tell that this is bad: it is what a reward model can be over-optimised by.
"""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..tiny import word_tokenizer

WORDS = ("sun", "moon", "sea", "wind", "rain", "stone", "tree", "bird", "fire", "snow")
END = "<end>"  # token 0; WORDS are tokens 1 to 10
PROMPT_WORDS = 3
MAX_WORDS = 4  # in a completion, and steps of whoever writes one
LENGTHS = {2: 0.2, 3: 0.35, 4: 0.45}  # shares of completions with so many words in the language
NO_ANSWER, REPEATED = -4.0, -2.0
AGAIN = 0.03  # factor of the probability of a word that the completion has already


def _table(seed: str, rows: int, scale: float) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.gauss(0, scale) for _ in WORDS] for _ in range(rows)]


# How the language goes on: word y behind w has the logit NEXT[w][y] + ABOUT[x_1][y], with the prompt's first word x_1.
NEXT, ABOUT = _table("next", len(WORDS), 1.0), _table("about", len(WORDS), 0.5)
(LIKED,) = _table("liked", 1, 0.9)
SUITS, FOLLOWS = _table("suits", len(WORDS), 0.35), _table("follows", len(WORDS), 0.35)


def all_prompts() -> list[str]:
    return [" ".join(words) for words in itertools.product(WORDS, repeat=PROMPT_WORDS)]


def numbers_of(text: str) -> list[int]:
    """The words as numbers from 0."""
    return [WORDS.index(word) for word in text.split()]


def write_completion(prompt: str, rng: random.Random) -> str:
    """A completion as the language has them: two to four words."""
    first, _, last = numbers_of(prompt)
    (length,) = rng.choices(list(LENGTHS), weights=list(LENGTHS.values()))
    words: list[int] = []
    for _ in range(length):
        following = zip(NEXT[words[-1] if words else last], ABOUT[first], strict=True)
        weights = [math.exp(a + b) * (AGAIN if word in words else 1) for word, (a, b) in enumerate(following)]
        words += rng.choices(range(len(WORDS)), weights=weights)
    return " ".join(WORDS[word] for word in words)


def hidden_reward(prompt: str, completion: str) -> float:
    _, second, last = numbers_of(prompt)
    words = numbers_of(completion)
    if not words:
        return NO_ANSWER
    pairs = zip([last, *words], words, strict=False)
    worth = sum(LIKED[word] + SUITS[second][word] + FOLLOWS[before][word] for before, word in pairs)
    return worth + REPEATED * (len(words) - len(set(words)))


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The hidden reward as a user's function, for `reward_funcs: [rlhf_trainer.studies.frontier.language:gold]`."""
    return [hidden_reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def leaf_rewards(prompt: str) -> Tensor:
    """The hidden reward of every completion, [leaves] fp64, in the order of `exact`."""
    _, second, last = numbers_of(prompt)
    liked = torch.tensor(LIKED, dtype=torch.float64) + torch.tensor(SUITS[second], dtype=torch.float64)
    gain = torch.tensor(FOLLOWS, dtype=torch.float64) + liked  # [before, word]
    levels = [torch.full((1,), NO_ANSWER, dtype=torch.float64)]
    for count in range(1, MAX_WORDS + 1):
        words = torch.cartesian_prod(*[torch.arange(len(WORDS))] * count).view(-1, count)
        before = torch.cat([torch.full_like(words[:, :1], last), words[:, :-1]], dim=1)
        again = sum((words[:, :i] == words[:, i : i + 1]).any(1) for i in range(count))
        levels.append(gain[before, words].sum(1) + REPEATED * again)
    return torch.cat(levels)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and the end, which pads, too."""
    return word_tokenizer((END, *WORDS))
