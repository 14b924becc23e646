"""A small language of restaurant reviews, and the reward that the demo hides from the model.

A prompt names a dish and a place: "review of the soup at the harbour :". A review is one to four sentences, such as
"the soup was warm . the waiter was rude .". Its writer is as often pleased as not, sentence by sentence.

The hidden reward of a review: +1 for every kind word, -1 for every unkind word. Nobody tells the model. It sees pairs
of its own reviews, of which an annotator preferred one, as Bradley and Terry have it: a is preferred to b with
probability sigma(reward(a) - reward(b)), so the annotator is sometimes wrong.
"""

import itertools
import random
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from ..tiny import word_tokenizer

DISHES = ["soup", "bread", "fish", "salad", "cake", "tea", "rice", "curry", "pie", "stew", "pasta", "coffee"]
PLACES = ["harbour", "market", "station", "garden", "museum", "castle", "bridge", "library", "mill", "square"]
STAFF = ["waiter", "cook", "host", "service"]
ROOM = ["room", "table", "view", "music"]
DISH_WORDS = ["warm", "rich", "fresh", "tasty", "lovely"], ["cold", "bland", "stale", "salty", "awful"]
STAFF_WORDS = ["kind", "quick", "cheerful", "helpful"], ["rude", "slow", "gloomy", "careless"]
ROOM_WORDS = ["bright", "pretty", "cosy", "pleasant"], ["dirty", "ugly", "dull", "dreadful"]
RETURN = "i will happily return .", "i will sadly not return ."
KIND = {*DISH_WORDS[0], *STAFF_WORDS[0], *ROOM_WORDS[0], "happily"}
UNKIND = {*DISH_WORDS[1], *STAFF_WORDS[1], *ROOM_WORDS[1], "sadly"}
END, UNKNOWN = "<end>", "<unknown>"


def all_prompts() -> list[str]:
    return [f"review of the {dish} at the {place} :" for dish, place in itertools.product(DISHES, PLACES)]


def write_review(prompt: str, rng: random.Random) -> str:
    """A review as people write it here: each sentence pleased or displeased by the toss of a coin."""

    def says(thing: str, words: tuple[list[str], list[str]]) -> str:
        return f"the {thing} was {rng.choice(rng.choice(words))} ."

    sentences = [says(prompt.split()[3], DISH_WORDS)]
    if rng.random() < 0.6:
        sentences.append(says(rng.choice(STAFF), STAFF_WORDS))
    if rng.random() < 0.6:
        sentences.append(says(rng.choice(ROOM), ROOM_WORDS))
    if rng.random() < 0.6:
        sentences.append(rng.choice(RETURN))
    return " ".join(sentences)


def is_grammatical(prompt: str, review: str) -> bool:
    """True if `write_review` could have written this for the prompt."""

    def says(things: list[str], words: tuple[list[str], list[str]]) -> str:
        return f"the ({'|'.join(things)}) was ({'|'.join(words[0] + words[1])}) [.]"

    dish, staff, room = says([prompt.split()[3]], DISH_WORDS), says(STAFF, STAFF_WORDS), says(ROOM, ROOM_WORDS)
    return re.fullmatch(f"{dish}( {staff})?( {room})?( {RETURN[0]}| {RETURN[1]})?", review.strip()) is not None


def hidden_reward(review: str) -> int:
    """+1 for every kind word, -1 for every unkind word."""
    words = review.split()
    return sum(word in KIND for word in words) - sum(word in UNKIND for word in words)


def make_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word, of this language and of `more`."""
    texts = [*all_prompts(), *RETURN, "was", *STAFF, *ROOM, *KIND, *UNKIND, *more]
    words = {word for text in texts for word in text.split()}
    return word_tokenizer([END, UNKNOWN, *sorted(words)], unk_token=UNKNOWN)
