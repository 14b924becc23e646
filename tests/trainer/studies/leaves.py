"""Leaves of the frontier's language as texts."""

from rlhf_trainer.studies.frontier.exact import W
from rlhf_trainer.studies.frontier.language import WORDS


def leaf_text(leaf):
    """The words of a leaf, by its place."""
    words = 0
    while leaf >= W**words:
        leaf, words = leaf - W**words, words + 1
    return " ".join(WORDS[leaf // W**place % W] for place in reversed(range(words)))
