"""Rollouts over HTTP, from a server that misbehaves on request; `test_transformers_serve.py` has a real one."""

import json
import re
import socket
import threading
import time

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from rlhf_trainer.data.encoding import Codec, encode_prompt, prompt_text
from rlhf_trainer.errors import UsageError
from rlhf_trainer.rollouts import http_json
from rlhf_trainer.rollouts.config import ServerConfig
from rlhf_trainer.rollouts.generation import Completion, Sampling, completion_text
from rlhf_trainer.rollouts.http_json import RequestError, Server
from rlhf_trainer.rollouts.loading import make_sampler
from rlhf_trainer.rollouts.sampler import Failure, GenerationRequest
from rlhf_trainer.rollouts.server import ServerSampler, check_servers
from tests.trainer.conftest import VOCABULARY
from tests.trainer.rollouts.scripted_server import Scripted, choice

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")
END = 1
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


SAMPLING = Sampling(max_new_tokens=4, temperature=0.7, top_k=5, top_p=0.9)


def generate(sampler, requests, seed=0, number=0):
    return sampler.generate(requests, SAMPLING, seed=seed, number=number)


def test_ids_travel_both_ways_with_their_logprobs(scripted, sampler, requests):
    def answer(path, body):
        first = body["prompt"][0]
        return choice(
            token_ids=[first, 7, END], finish_reason="stop",
            logprobs={"tokens": ["?"] * 3, "token_logprobs": [-0.5, -1.25, -first / 8]},
        )  # fmt: skip

    scripted.answer = answer
    done = generate(sampler(), requests)  # answers come in any order, completions in that of the prompts
    assert done == [Completion([one.ids[0], 7, END], True, [-0.5, -1.25, -one.ids[0] / 8]) for one in requests]
    assert {path for path, _ in scripted.requests} == {"/v1/completions"}
    bodies = sorted((body for _, body in scripted.requests), key=lambda body: body["prompt"])
    assert [body["prompt"] for body in bodies] == sorted(one.ids for one in requests)
    assert bodies[0].items() >= {
        "model": "policy", "max_tokens": 4, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [END], "return_token_ids": True,
    }.items()  # fmt: skip
    assert len({body["seed"] for body in bodies}) == len(requests)


def test_seeds_depend_on_seed_batch_and_place_alone(scripted, sampler, requests):
    scripted.answer = lambda path, body: choice(token_ids=[body["seed"] % 300 + 2, body["seed"] // 300 % 300 + 2])
    make = sampler(concurrency=2)
    first = generate(make, requests)
    assert generate(make, requests) == first
    assert generate(make, requests, seed=1) != first and generate(make, requests, number=1) != first


def test_text_travels_where_ids_cannot(scripted, sampler, requests, tokenizer):
    scripted.answer = lambda path, body: choice(text=" the cat", finish_reason="stop")
    done = generate(sampler(prompts="text"), requests)
    ids = tokenizer(" the cat").input_ids
    assert done == [Completion([*ids, END], True, None)] * 4
    assert completion_text(tokenizer, done[0], requests[0].ids) == " the cat"
    for _, body in scripted.requests:
        assert tokenizer(body["prompt"]).input_ids in [one.ids for one in requests]
        assert not body.keys() & {"top_k", "min_p", "stop_token_ids", "return_token_ids"}  # transformers refuses them
        assert json.loads(body["generation_config"])["top_k"] == 5


def test_a_start_that_the_servers_tokenizer_adds_itself_is_not_sent(scripted, sampler, tokenizer):
    """<s> is in the chat template's text, and tokenizers put another one before every text."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<|im_end|>",
        chat_template="{{ bos_token }}" + tokenizer.chat_template,
    )  # fmt: skip
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    messages = [{"role": "user", "content": "see me"}]
    ids, text = encode_prompt(Codec(own), messages), prompt_text(Codec(own), messages)
    assert ids[:2].count(0) == 1
    scripted.answer = lambda path, body: choice(text=" on")
    make = sampler(prompts="text")
    make.tokenizer = own
    generate(
        make,
        [
            GenerationRequest(ids, text, "row 1"),
            GenerationRequest(encode_prompt(Codec(own), "the cat"), "the cat", "row 2"),
        ],
    )
    assert sorted(own(body["prompt"]).input_ids for _, body in scripted.requests) == sorted(
        [ids, encode_prompt(Codec(own), "the cat")]
    )
    (failure, good) = generate(
        make, [GenerationRequest([5, 6], "the cat", "row 1"), GenerationRequest(ids, text, "row 2")]
    )
    assert failure.where == "row 1" and "other tokens" in failure.reason and isinstance(good, Completion)


def test_logprobs_are_kept_only_with_the_tokens_they_are_of(scripted, sampler, requests, tokenizer):
    ids = tokenizer(" sat on").input_ids
    tokens = [" sat", " on"]
    assert [tokenizer.decode([id]) for id in ids] == tokens

    def logprobs(*values, tokens=tokens):
        return {"tokens": tokens, "token_logprobs": list(values)}

    cases = [
        (choice(text=" sat on", logprobs=logprobs(-1, -2.0)), Completion(ids, False, [-1.0, -2.0])),
        (choice(text=" sat on", logprobs=logprobs(-1.0, -2.0, tokens=[" sa", "t on"])), Completion(ids, False)),
        (choice(text=" sat on", logprobs=logprobs(-1.0, -2.0), finish_reason="stop"), Completion([*ids, END], True)),
        (
            choice(
                text=" sat on", logprobs=logprobs(-1.0, -2.0, -3.0, tokens=[*tokens, "<|im_end|>"]),
                finish_reason="stop",
            ),
            Completion([*ids, END], True, [-1.0, -2.0, -3.0]),
        ),
        (choice(token_ids=ids, logprobs=logprobs(-1.0)), Completion(ids, False)),  # one is missing
        (choice(token_ids=ids, logprobs=logprobs(-1.0, None)), Completion(ids, False)),
        (choice(token_ids=ids, logprobs=logprobs(-1.0, float("nan"))), Completion(ids, False)),
        (choice(token_ids=ids, logprobs=[-1.0, -2.0]), Completion(ids, False)),
        # A server that does not count the end among the tokens, and one that goes on behind it.
        (choice(token_ids=ids, logprobs=logprobs(-1.0, -2.0), finish_reason="stop"), Completion([*ids, END], True)),
        (choice(token_ids=[9, END, 9], logprobs=logprobs(-1.0, -2.0, -3.0)), Completion([9, END], True, [-1.0, -2.0])),
        (choice(text=" sat on a mat and ate"), Completion(tokenizer(" sat on a mat").input_ids, False)),  # 4 at most
        (choice(text="", finish_reason="stop"), Completion([END], True)),
    ]  # fmt: skip
    for answer, expected in cases:
        scripted.answer = lambda path, body, answer=answer: answer
        assert generate(sampler(), requests[:1]) == [expected], answer


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((500, b"out of memory"), "HTTP 500: out of memory"),
        ((503, b""), "HTTP 503: Service Unavailable"),
        ((429, {"error": "slow down"}), "HTTP 429: .*slow down"),
        (b"", "RemoteDisconnected"),
        (b"rubbish\r\n\r\n", "BadStatusLine: rubbish"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [', "not JSON"),  # it died while it spoke
        ((200, b"<html>busy</html>"), "not JSON: '<html>busy"),
        ((200, b"\xff\xfe\x00"), "not JSON"),
        ((200, b"[" * 100_000), "not JSON"),
        ((200, b""), "not JSON"),
        ((200, [1, 2]), "expected an answer with one choice"),
        ((200, {"choices": []}), "one choice, got 0 choices"),
        ((200, {"choices": [{"token_ids": [3], "finish_reason": "stop"}] * 2}), "one choice, got 2 choices"),
        ((200, {"choices": [None]}), "one choice, got 1 choices"),
        (choice(text=None), "expected a choice with text"),
        (choice(text="\ud800", finish_reason="stop"), "expected a choice with text"),
        (choice(token_ids=[3], finish_reason="abort"), "expected finish_reason stop or length, got 'abort'"),
        (choice(token_ids=[3], finish_reason=None), "expected finish_reason stop or length, got None"),
        (choice(token_ids=["a"]), "expected token_ids from 0 to 396"),
        (choice(token_ids=[VOCABULARY]), "expected token_ids from 0 to 396"),
        (choice(token_ids=[True]), "expected token_ids"),
        (choice(token_ids=[]), "has no tokens"),
        (choice(token_ids=[3], logprobs={"token_logprobs": [10**400]}), "number too large for a float"),
        ((200, b" " * (2**20 + 4 * 2**12 + 1)), "the answer has more than the 1064960 bytes"),
        ((500, b"\x1b[2Jbusy\x07"), r"HTTP 500:  \[2Jbusy"),
        (b"\x1b[2Jrubbish\r\n\r\n", r"BadStatusLine:  \[2Jrubbish"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_trouble_is_tried_again_then_reported(scripted, sampler, requests, bad, message):
    """Row 1 works at its third try, row 2 never, row 3 at once."""
    tries = {tuple(one.ids): 0 for one in requests}

    def answer(path, body):
        prompt = tuple(body["prompt"])
        tries[prompt] += 1
        fails = {tuple(requests[0].ids): 2, tuple(requests[1].ids): 99}.get(prompt, 0)
        return bad if tries[prompt] <= fails else choice(token_ids=[3])

    scripted.answer = answer
    first, failed, third = generate(sampler(), requests[:3])
    assert first == third == Completion([3], False)
    assert isinstance(failed, Failure) and failed.where == "row 2"
    assert "at the last of 4 tries" in failed.reason
    assert re.search(message, failed.reason) and failed.reason.isprintable()
    assert list(tries.values()) == [3, 4, 1, 0]


def test_a_server_that_stalls_is_not_waited_for(scripted, sampler, requests):
    def answer(path, body):
        if body["prompt"] == requests[0].ids:
            scripted.over.wait(20)
        return choice(token_ids=[3])

    scripted.answer = answer
    failed, good = generate(sampler(timeout_s=1.0, retries=1), requests[:2])
    assert failed == Failure("row 1", "no answer within 1 seconds (at the last of 2 tries)")
    assert good == Completion([3], False)


def test_an_answer_that_drips_in_forever_ends_with_the_timeout(requests, tokenizer):
    """Each byte is in time, the whole never is."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip():
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not over.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.5, 0)
        sampler = ServerSampler([server], "policy", tokenizer, ends=[END], vocabulary=VOCABULARY)
        with pytest.raises(UsageError, match=r"row 1: no answer within 0\.5 seconds"):
            generate(sampler, requests[:1])
    finally:
        over.set()
        thread.join()
        listening.close()


def test_what_the_server_refuses_is_not_requested_again(scripted, sampler, requests):
    def answer(path, body):
        too_long = body["prompt"] == requests[2].ids
        return (400, {"error": "prompt too long"}) if too_long else choice(token_ids=[3])

    scripted.answer = answer
    done = generate(sampler(), requests)
    assert done[2] == Failure("row 3", 'HTTP 400: {"error": "prompt too long"}')
    assert [type(each) for each in done] == [Completion, Completion, Failure, Completion]
    assert len(scripted.requests) == 4


def test_if_nothing_comes_the_run_stops_and_says_what_to_check(scripted, sampler, requests):
    scripted.answer = lambda path, body: (404, {"error": "no model policy"})
    with pytest.raises(UsageError, match=r"any of 4 prompts.*row 1: HTTP 404.*no model policy.*server_model"):
        generate(sampler(), requests)
    assert generate(sampler(), []) == []


def test_a_batch_of_bad_prompts_alone_does_not_stop_a_run_that_worked(scripted, sampler, requests):
    """But a server that is gone does."""
    make, gone = sampler(retries=0), []

    def answer(path, body):
        if path == "/v1/models":
            return (500, b"dying") if gone else (200, {"data": []})
        return (400, b"too long") if body["prompt"] == requests[0].ids else choice(token_ids=[3])

    scripted.answer = answer
    generate(make, requests)
    assert generate(make, requests[:1] * 3) == [Failure("row 1", "HTTP 400: too long")] * 3
    gone.append(True)
    with pytest.raises(UsageError, match=r"no OpenAI-compatible server answers at .*: HTTP 500: dying"):
        generate(make, requests[:1])


def test_delays_between_tries_double(scripted, sampler, requests, monkeypatch):
    delays = []
    monkeypatch.setattr(time, "sleep", delays.append)
    monkeypatch.setattr(http_json, "JITTER", 0.0)
    scripted.answer = lambda path, body: (500, b"")
    with pytest.raises(UsageError):
        generate(sampler(retries=8, first_delay_s=1.0), requests[:1])
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_no_more_requests_are_under_way_than_allowed(scripted, sampler, requests):
    under_way, most, lock, three = 0, 0, threading.Lock(), threading.Barrier(3)

    def answer(path, body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        three.wait(60)  # for two others to be under way
        with lock:
            under_way -= 1
        return choice(token_ids=[3])

    scripted.answer = answer
    assert generate(sampler(concurrency=3, timeout_s=90.0), requests * 3) == [Completion([3], False)] * 12
    assert most == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [((404, b"?"), "HTTP 404"), ((200, b"<html>"), "not JSON"), ((200, {"models": []}), "expected a list of models")],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_such_server_is_reported_at_the_start(scripted, sampler, answer, message):
    scripted.answer = lambda path, body: answer
    with pytest.raises(UsageError, match=rf"no OpenAI-compatible server answers at .*/v1/models: .*{message}"):
        check_servers(sampler().servers)
    assert len(scripted.requests) == 1


def test_a_server_that_is_not_there_is_reported_at_the_start(make_model, tokenizer):
    with socket.socket() as free:  # bound, but not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1/"
        config = ServerConfig(output_dir="out", use_vllm=True, vllm_server_base_url=url, vllm_server_timeout=0.0)
        with pytest.raises(UsageError, match="ConnectionRefusedError"):
            make_sampler(config, make_model("llama"), tokenizer)


def test_text_is_encoded_in_its_place(scripted, sampler):
    """A tokenizer of SentencePiece's kind puts a space in front of any text, also of one that goes on in a word."""
    pieces = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "\u2581", "Hi", "\u2581Hi"]
    own = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("H", "i"), ("\u2581", "Hi")])
    make = sampler(prompts="text")
    make.tokenizer, make.ends = own, [own.eos_token_id]
    request = GenerationRequest(own("ab").input_ids, "ab", "row 1")
    for text, tokens in (("Hi", ["Hi"]), (" Hi", ["\u2581Hi"])):
        scripted.answer = lambda path, body, text=text: choice(text=text, finish_reason="stop")
        (done,) = generate(make, [request])
        assert own.convert_ids_to_tokens(done.ids) == [*tokens, "</s>"]


@pytest.mark.parametrize(
    ("header", "waits"),
    [("7", 7.0), ("0.1", 1.0), ("90", 90.0), ("86400", 600.0), ("soon", 1.0), ("nan", 1.0), ("-3", 1.0),
     ("Wed, 21 Oct 2099 07:28:00 GMT", 600.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0), (None, 1.0)],
)  # fmt: skip
def test_a_server_says_when_to_try_again(header, waits, monkeypatch):
    """In seconds or by a date; never earlier than without, and at most ten minutes later."""
    slept = []
    monkeypatch.setattr(http_json.time, "sleep", slept.append)
    monkeypatch.setattr(http_json, "JITTER", 0.0)
    answers = iter([RequestError("HTTP 429: busy", status=429, delay_s=http_json.wish_of(header)), "done"])

    def exchange(path, body, is_json):
        answer = next(answers)
        if isinstance(answer, RequestError):
            raise answer
        return answer

    server = http_json.Server("http://127.0.0.1:9", 5.0, retries=1)
    monkeypatch.setattr(server, "_exchange", exchange)
    assert server.request("/", None, lambda answer: answer) == "done" and slept == [waits]


def test_the_header_of_a_busy_server_is_read(monkeypatch):
    slept, scripted, busy = [], Scripted(), [b"HTTP/1.0 503 Busy\r\nRetry-After: 42\r\n\r\nlater"]
    monkeypatch.setattr(http_json.time, "sleep", slept.append)
    monkeypatch.setattr(http_json, "JITTER", 0.0)
    scripted.answer = lambda path, body: busy.pop() if busy else (200, {"ready": True})
    with scripted.running() as url:
        assert http_json.Server(url, 5.0, retries=1).request("/", {}, lambda answer: answer) == {"ready": True}
    assert slept == [42.0]
