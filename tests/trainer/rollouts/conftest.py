"""Requests for samplers."""

import pytest

from rlhf_trainer.data.encoding import Codec, encode_prompt
from rlhf_trainer.rollouts.sampler import GenerationRequest


@pytest.fixture(scope="session")
def requests(tokenizer):
    """Three texts and a conversation to be continued."""
    prompts = ["the cat", "dogs ran far", "a mat on the green hills", [{"role": "user", "content": "see me"}]]
    return [
        GenerationRequest(encode_prompt(Codec(tokenizer), prompt), prompt, f"row {i}")
        for i, prompt in enumerate(prompts, start=1)
    ]
