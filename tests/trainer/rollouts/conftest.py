"""Requests for samplers."""

import pytest

from rlhf_trainer.data.encoding import Codec, encode_prompt, prompt_text
from rlhf_trainer.rollouts.sampler import GenerationRequest


@pytest.fixture(scope="session")
def prompts():
    """Three texts and a conversation."""
    return ["the cat", "dogs ran far", "a mat on the green hills", [{"role": "user", "content": "see me"}]]


@pytest.fixture(scope="session")
def requests(prompts, tokenizer):
    """The prompts, to be continued."""
    codec = Codec(tokenizer)
    return [
        GenerationRequest(encode_prompt(codec, prompt), prompt_text(codec, prompt), f"row {i}")
        for i, prompt in enumerate(prompts, start=1)
    ]
