"""What a server and its address may not see, or have printed: keys, passwords."""

import pytest

from rlhf_trainer.errors import UsageError
from rlhf_trainer.rollouts.config import ServerConfig
from rlhf_trainer.rollouts.generation import Sampling
from rlhf_trainer.rollouts.http_json import KEY_VARIABLE, Server
from rlhf_trainer.rollouts.server import check_servers
from tests.trainer.rollouts.scripted_server import Scripted, choice

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")


def generate(sampler, requests):
    return sampler.generate(requests, Sampling(max_new_tokens=4), seed=0, number=0)


def test_a_key_goes_along(scripted, sampler, requests, monkeypatch):
    scripted.answer = lambda path, body: choice(token_ids=[3])
    generate(sampler(), requests[:1])
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    generate(sampler(), requests[:1])
    assert scripted.keys == [None, "Bearer secret"]


@pytest.mark.parametrize("key", ["secret\n", " secret\r\n", "secret"])
def test_blanks_around_a_key_are_no_part_of_it(key, scripted, sampler, requests, monkeypatch):
    scripted.answer = lambda path, body: choice(token_ids=[3])
    monkeypatch.setenv(KEY_VARIABLE, key)
    generate(sampler(), requests[:1])
    assert scripted.keys == ["Bearer secret"]


@pytest.mark.parametrize("key", ["sec\nret", "sec\x7fret", "secret\u20ac"])
def test_a_key_that_no_header_can_hold_is_not_shown(key, scripted, sampler, requests, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UsageError, match=f"{KEY_VARIABLE} must be one line") as error:
        generate(sampler(), requests[:1])
    assert "sec" not in str(error.value).replace("seconds", "") and scripted.requests == []


ECHOES = [
    (500, b"x" * 295 + b"Bearer secret-key"), (401, b"secret-key is wrong"), (200, b"secret-key"),
    (200, {"choices": [{"finish_reason": "secret-key"}]}), (200, {"choices": "secret-key"}), b"secret-key\r\n\r\n",
    b"HTTP/1.1 500 secret-key\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("answer", ECHOES, ids=str)
def test_a_key_that_a_server_repeats_is_not_shown(answer, scripted, sampler, requests, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-key")
    scripted.answer = lambda path, body: answer
    with pytest.raises(UsageError, match="gave no completion") as error:
        generate(sampler(retries=0), requests[:1])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status, scripted, sampler, requests, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    other = Scripted()
    other.answer = lambda path, body: choice(token_ids=[3])
    with other.running() as url:
        start = f"HTTP/1.1 {status} Moved\r\nContent-Length: 0\r\nLocation: {url}/v1/completions\r\n\r\n"
        scripted.answer = lambda path, body: start.encode()
        with pytest.raises(UsageError, match=f"HTTP {status}: Moved. Redirects are not followed"):
            generate(sampler(), requests[:1])
        with pytest.raises(UsageError, match="Redirects are not followed"):
            check_servers(sampler().servers)
    assert other.requests == [] and len(scripted.requests) == 2


URLS = [
    "http://user:password@host", "https://password@host:1", "user:password@host", "http://host?key=password",
    "http://host/v1#password", "http://[::1", "http://host:port", "http://host:99999", "http://", "ftp://host",
    "http://h\u00f6st", "http://host name", "http://host\n",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(UsageError, match="vllm_server_base_url must start with http://") as error:
        ServerConfig(output_dir="out", use_vllm=True, vllm_server_base_url=url)
    assert "password@" not in str(error.value) and "=password" not in str(error.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://host", "http://127.0.0.1:80/", "http://host/proxy"])
def test_addresses_that_are_taken(url):
    assert ServerConfig(output_dir="out", use_vllm=True, vllm_server_base_url=url).server_urls == [url]


def test_a_host_whose_name_cannot_be_one_is_reported(tokenizer):
    server = Server(f"http://{'a' * 70}", retries=0)
    with pytest.raises(UsageError, match=r"UnicodeError|gaierror"):
        check_servers([server])
