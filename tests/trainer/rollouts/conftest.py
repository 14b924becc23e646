"""Requests for samplers, and a sampler that asks a scripted server."""

import pytest

from rlhf_trainer.data.encoding import Codec, encode_prompt, prompt_text
from rlhf_trainer.rollouts.http_json import Server
from rlhf_trainer.rollouts.sampler import GenerationRequest
from rlhf_trainer.rollouts.server import ServerSampler
from tests.trainer.conftest import VOCABULARY
from tests.trainer.rollouts.scripted_server import Scripted

END = 1


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


@pytest.fixture
def scripted():
    return Scripted()


@pytest.fixture
def sampler(scripted, tokenizer):
    """options -> a sampler that asks the scripted server."""
    with scripted.running() as url:

        def make(**options):
            connection = {"retries": 3, "first_delay_s": 0.01, "timeout_s": 10.0}
            server = Server(url, **{name: options.pop(name, default) for name, default in connection.items()})
            return ServerSampler([server], "policy", tokenizer, ends=[END], vocabulary=VOCABULARY, **options)

        yield make
