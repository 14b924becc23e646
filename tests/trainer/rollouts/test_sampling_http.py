"""`rlhf sample` with a server: what it writes, what it fails at, and what is left of a run when it dies."""

import json
import random

import pytest
from safetensors.torch import load_file

from rlhf_trainer.data.completions import COMPLETIONS_FILE
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.loading import load_causal_lm
from rlhf_trainer.rollouts import http_json as json_server
from rlhf_trainer.rollouts import sample as sampling
from rlhf_trainer.rollouts.config import SampleConfig
from rlhf_trainer.rollouts.sample import FAILURES_FILE, sample
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder
from tests.trainer.rollouts.scripted_server import VLLM, Led, Scripted, choices

PROMPTS = ["the cat", "dogs ran far", "a mat on the green hills"]


@pytest.fixture
def server(monkeypatch, loopback_without_proxy):
    """It writes three words by the seed of the request."""
    monkeypatch.setattr(json_server, "LONGEST_DELAY_S", 0.01)

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": []}
        rng = random.Random(body["seed"])
        texts = ["".join(rng.choices([" sat", " on", " fish", " today"], k=3)) for _ in range(body["n"])]
        return choices({"text": text, "finish_reason": "stop"} for text in texts)

    scripted = Scripted()
    scripted.answer = answer
    return scripted


@pytest.fixture
def run(model_folder, write_jsonl, tmp_path, monkeypatch):
    """One model, 3 prompts, 4 completions each, in batches of 4; no weights are loaded."""
    monkeypatch.setattr(sampling, "load_causal_lm", None)
    prompts = write_jsonl([{"prompt": prompt} for prompt in PROMPTS], "prompts.jsonl")

    def run(url, output="out", **options):
        small = {
            "models": [model_folder("llama")], "dataset_name": prompts, "num_completions": 4, "max_new_tokens": 6,
            "per_device_generation_batch_size": 4, "output_dir": str(tmp_path / output), "use_vllm": True,
            "vllm_server_base_url": url, "server_retries": 1, "vllm_server_timeout": 0.0,
        }  # fmt: skip
        return sample(SampleConfig(**small | options))

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_writes_in_the_models_place(server, run, model_folder):
    with server.running() as url:
        folder = run(url, server_model="tiny")
        assert (run(url, "again", server_model="tiny") / COMPLETIONS_FILE).read_bytes() == (
            folder / COMPLETIONS_FILE
        ).read_bytes()
    lines = lines_of(folder / COMPLETIONS_FILE)
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(4)]
    assert {line["model"] for line in lines} == {model_folder("llama")}
    assert len({line["completion"] for line in lines}) > 6 and all(line["finished"] for line in lines)
    assert {body["model"] for path, body in server.requests if path == "/v1/completions"} == {"tiny"}
    assert sorted(path.name for path in folder.iterdir()) == [COMPLETIONS_FILE, CONFIG_FILE]


def test_a_server_gets_a_head_that_is_the_embeddings_as_well(run, model_folder, monkeypatch):
    """The folder as it is has it once, and is sent as it is where it has all."""
    monkeypatch.setattr(sampling, "load_causal_lm", load_causal_lm)
    for family in ("llama", "qwen3"):
        server, sent = Led(*VLLM), []

        def answer(path, body, server=server, sent=sent):
            if path == "/collective_rpc" and body:
                sent.append(
                    (
                        body["kwargs"]["weights_path"],
                        "lm_head.weight" in load_file(f"{body['kwargs']['weights_path']}/model.safetensors"),
                    )
                )
            return server.reply(path, body)

        server.answer = answer
        with server.running() as url:
            folder = run(url, family, models=[model_folder(family)], weight_sync="folder")
        ((path, has_head),) = sent
        assert has_head and (path == model_folder(family)) == (family == "llama")
        assert sorted(path.name for path in folder.iterdir()) == [COMPLETIONS_FILE, CONFIG_FILE]


def test_what_fails_at_every_try_is_kept_apart_and_can_be_sampled_again(server, run, tokenizer, capsys):
    works, bad = server.answer, tokenizer(PROMPTS[1]).input_ids

    def answer(path, body):
        return (500, b"crashed") if body and body["prompt"] == bad else works(path, body)

    with server.running() as url:
        server.answer = answer
        folder = run(url, num_completions=2)  # batches: the two of the longest and the bad ones; the rest
        assert [line["prompt"] for line in lines_of(folder / COMPLETIONS_FILE)] == [PROMPTS[0]] * 2 + [PROMPTS[2]] * 2
        failures = lines_of(folder / FAILURES_FILE)
        assert [(line["prompt"], line["prompt_row"]) for line in failures] == [(PROMPTS[1], 2)] * 2
        assert all(line["reason"] == "HTTP 500: crashed (at the last of 2 tries)" for line in failures)
        out = capsys.readouterr().out
        assert "4 completions of 2 prompts" in out and "2 more failed" in out and "HTTP 500: crashed" in out
        server.answer = works
        again = run(url, "again", dataset_name=str(folder / FAILURES_FILE), num_completions=1)
    assert [line["prompt"] for line in lines_of(again / COMPLETIONS_FILE)] == [PROMPTS[1]] * 2


def test_a_run_whose_server_died_goes_on_with_another(server, run, tmp_path):
    works = server.answer
    with server.running() as url:
        whole = (run(url, "whole") / COMPLETIONS_FILE).read_bytes()
        server.requests.clear()

        def dies(path, body):
            made = sum(path == "/v1/completions" for path, _ in server.requests)
            return works(path, body) if made <= 1 else (500, b"dead")

        server.answer = dies
        with pytest.raises(UsageError, match="no OpenAI-compatible server answers"):
            run(url, "broken")
    assert partial_folder(tmp_path / "broken").exists()
    other = Scripted()
    other.answer = works
    with other.running() as url:
        assert (
            run(url, "broken", resume_from_checkpoint=True, server_timeout=5.0) / COMPLETIONS_FILE
        ).read_bytes() == whole
    assert sum(path == "/v1/completions" for path, _ in other.requests) == 2  # a prompt's four were there


def test_a_missing_server_is_reported_before_anything_is_written(run, tmp_path):
    with pytest.raises(
        UsageError, match=r"vllm_server_base_url: no OpenAI-compatible server answers at http://127.0.0.1:9/"
    ):
        run("http://127.0.0.1:9")
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_model": "tiny", "models": ["a", "b"]}, "the name of one model"),
    ],
    ids=["two models"],
)
def test_options_that_no_server_can_follow_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SampleConfig(**{"models": ["a"], "dataset_name": "d", "output_dir": "o", "use_vllm": True} | options)
