"""Rollouts, and `rlhf sample`, from transformers' own `serve`, which the tests start on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from rlhf_trainer.data.completions import COMPLETIONS_FILE
from rlhf_trainer.errors import UsageError
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.rollouts.config import SampleConfig, ServerConfig
from rlhf_trainer.rollouts.generation import Sampling
from rlhf_trainer.rollouts.loading import make_sampler
from rlhf_trainer.rollouts.sample import sample
from rlhf_trainer.rollouts.sampler import LocalSampler
from tests.trainer.conftest import VOCABULARY, WORDS

pytestmark = [
    pytest.mark.usefixtures("loopback_without_proxy"),
    pytest.mark.xdist_group("transformers serve"),  # one worker, one server
]
END = 1
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def writes_words(make_model, tokenizer, seed):
    """A model whose likeliest token is a whole word or the end, so that text and tokens say the same."""
    model = make_model("llama", seed=seed)
    words = [ids[0] for word in WORDS if len(ids := tokenizer(" " + word).input_ids) == 1]
    assert len(words) > 15
    with torch.no_grad():
        others = [id for id in range(VOCABULARY) if id not in (*words, END)]
        model.lm_head.weight[others] = 0.0
        model.lm_head.weight[[*words, END]] *= 2  # many words: one of them has a logit far above 0
    return model


@pytest.fixture(scope="module")
def served(make_model, tokenizer, tmp_path_factory):
    """(url, folder of the model): transformers serve, on a free port of loopback, gone when the tests are."""
    folder = tmp_path_factory.mktemp("served")
    writes_words(make_model, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub"))}
    log = folder.with_name("serve.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", "--host",
                "127.0.0.1", "--port", str(port), "--device", "cpu",
            ],
            env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + "/v1/models", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield url, str(folder)
    finally:
        process.kill()
        process.wait()


def over_http(served, model, tokenizer, **options):
    url, folder = served
    config = ServerConfig(
        output_dir="out",
        use_vllm=True,
        vllm_server_base_url=url,
        server_model=folder,
        server_prompts="text",
        server_timeout=60.0,
        **options,
    )
    return make_sampler(config, model, tokenizer)


def test_greedy_completions_of_transformers_serve_are_those_made_here(served, make_model, tokenizer, requests):
    model = writes_words(make_model, tokenizer, seed=0)
    here = LocalSampler(model, tokenizer, bf16=False).generate(requests, GREEDY, seed=0, number=0)
    assert len({tuple(done.ids) for done in here}) == len(requests)
    there = over_http(served, model, tokenizer).generate(requests, GREEDY, seed=0, number=0)
    assert there == [done._replace(logprobs=None) for done in here]  # it has no log-probs


def test_transformers_serve_draws_as_requested(served, make_model, tokenizer, requests):
    """Alone, it would take the likeliest token whatever the temperature: the model's settings say not to draw."""
    sampler = over_http(served, writes_words(make_model, tokenizer, seed=0), tokenizer, server_concurrency=1)

    def drawn(seed, **options):
        sampling = Sampling(max_new_tokens=12, **options)
        return [tuple(done.ids) for done in sampler.generate([requests[0]] * 6, sampling, seed=seed, number=0)]

    first = drawn(0)
    assert len(set(first)) > 3
    assert drawn(0) == first and drawn(1) != first
    assert len(set(drawn(0, top_k=1))) == 1


def test_sync_by_folder_changes_what_transformers_serve_writes(served, make_model, tokenizer, requests, tmp_path):
    model = writes_words(make_model, tokenizer, seed=0)
    sampler = over_http(served, model, tokenizer, weight_sync="folder")
    before = sampler.generate(requests, GREEDY, seed=0, number=0)
    for seed in (1, 2):
        changed = writes_words(make_model, tokenizer, seed=seed)
        sampler.sync(changed, tokenizer, tmp_path / "policy")
        here = LocalSampler(changed, tokenizer, bf16=False).generate(requests, GREEDY, seed=0, number=0)
        after = sampler.generate(requests, GREEDY, seed=0, number=0)
        assert after == [done._replace(logprobs=None) for done in here] != before
        assert len(list((tmp_path / "policy").iterdir())) == 1  # that of the policy before is gone
        before = after


def test_rlhf_sample_has_the_same_written_by_transformers_serve(served, write_jsonl, prompts, tmp_path):
    url, folder = served
    data = write_jsonl([{"prompt": prompt} for prompt in prompts])

    def written(output, **options):
        config = SampleConfig(
            output_dir=str(tmp_path / output), models=[folder], dataset_name=data, num_completions=2, temperature=0.0,
            max_new_tokens=12, per_device_generation_batch_size=4, **options,
        )  # fmt: skip
        return (sample(config) / COMPLETIONS_FILE).read_bytes()

    assert written("there", use_vllm=True, vllm_server_base_url=url, server_prompts="text") == written("here")


def test_grpo_learns_from_completions_of_transformers_serve(served, write_jsonl, prompts, tmp_path):
    """The server follows the policy: what is rewarded becomes more frequent in what the server writes."""
    url, folder = served
    data = write_jsonl([{"prompt": prompt} for prompt in prompts])
    trained = train_grpo(
        GRPOConfig(
            output_dir=str(tmp_path / "out"), model_name_or_path=folder, dataset_name=data,
            reward_funcs=["regex:cat|mat|sat"], use_vllm=True, vllm_server_base_url=url, server_prompts="text",
            weight_sync="folder", server_timeout=60.0, max_prompt_length=48,
            max_completion_length=6, batch_size=32, num_generations=8, max_steps=5, learning_rate=1e-2,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    assert all(line["rollouts/failed"] == 0 for line in lines)
    assert not (trained / "policy").exists()  # what the server loaded is not part of the result


def test_what_transformers_serve_refuses_is_reported_in_its_words(served, make_model, tokenizer, requests):
    sampler = over_http(served, make_model("llama"), tokenizer)
    sampler.prompts = "ids"
    with pytest.raises(UsageError, match=r"any of 4 prompts.*row 1: HTTP 422: .*Unexpected fields.*server_prompts"):
        sampler.generate(requests, GREEDY, seed=0, number=0)
