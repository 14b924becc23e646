"""A real vLLM samples for the policy and follows it: its tokens, its log-probs, and a run within which it dies."""

import json
import shutil
import subprocess
import time

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.server_check import check_server
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rollouts.generation import Sampling
from rlhf_trainer.rollouts.loading import make_sampler
from rlhf_trainer.rollouts.sampler import request_of
from tests.real import vllm_grpo
from tests.real.real_models import END, SMOLLM2
from tests.real.vllm_server import PROGRAM, REASON, VLLMServer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm")]
BF16_NATS = 0.1  # the mean difference of a log-prob that bf16 makes here is a fifth of it
STEPS = 8


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """vLLM with SmolLM2, started once; its log is kept where it fails."""
    if not PROGRAM.is_file():
        pytest.skip(f"no vLLM: {REASON.read_text().strip() if REASON.is_file() else 'run `make vllm`'}")
    running = VLLMServer(SMOLLM2.path, tmp_path_factory.mktemp("vllm") / "vllm.log")
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def work(tmp_path):
    """A folder that goes, with models of half a gigabyte each, when the test is done."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def setup_of(server, work):
    """(options) -> what a run of GRPO would start with."""
    vllm_grpo.command(SMOLLM2.path, server.url, "lora", work / "rows")

    def make(**options):
        config = GRPOConfig(
            model_name_or_path=str(SMOLLM2.path), dataset_name=str(work / "questions.jsonl"),
            reward_funcs=["tests.real.vllm_grpo:brevity"], inspect_rows=0, use_vllm=True,
            vllm_server_base_url=server.url, **{"output_dir": str(work / "out")} | options,
        )  # fmt: skip
        return prepare(config)

    return make


@pytest.fixture
def own_weights(setup_of, work):
    """The server has its own weights again when the test is done."""
    yield
    setup = setup_of(weight_sync="folder", output_dir=str(work / "own"))
    sampler_of(setup).sync(setup.policy.model, setup.tokenizer, work / "own")


def sampler_of(setup):
    return make_sampler(setup.config, setup.policy.model, setup.tokenizer)


def requests_of(setup, each=1):
    return [request_of(prompt, "questions") for prompt in setup.prompts for _ in range(each)]


@torch.no_grad()
def logprobs_of(model, prompt, ids):
    """transformers' own log-probs of a completion, fp32."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def gap(model, requests, done):
    """The mean difference between the server's log-probs and the model's, over all tokens of some completions."""
    differences = [
        (torch.tensor(one.logprobs) - logprobs_of(model, request.ids, one.ids)).abs()
        for request, one in zip(requests, done, strict=True)
    ]
    return torch.cat(differences).mean().item()


def test_tokens_and_logprobs_are_those_of_the_model(setup_of):
    setup = setup_of(weight_sync="none", temperature=1.0)
    sampler, requests = sampler_of(setup), requests_of(setup, 4)
    done = sampler.generate(requests, Sampling(12), seed=1, number=0)
    assert all(0 < len(one.ids) <= 12 and len(one.logprobs) == len(one.ids) for one in done)
    assert all(one.finished == (setup.tokenizer.decode(one.ids[-1:]) == END) for one in done)
    assert any(one.finished for one in done) and not all(one.finished for one in done)
    assert len({tuple(one.ids) for one in done[:4]}) > 1  # of one request
    assert gap(setup.policy.model, requests, done) < BF16_NATS
    assert sampler.generate(requests, Sampling(12), seed=1, number=0)[0].ids == done[0].ids
    assert sampler.metrics()["rollouts/server_0/requests"] == 2 * len(setup.prompts)  # a group is one


def test_logprobs_are_of_the_distribution_that_is_drawn_from(setup_of):
    setup = setup_of(weight_sync="none")
    requests = requests_of(setup)[:4]
    done = sampler_of(setup).generate(requests, Sampling(8, temperature=0.5), seed=1, number=0)
    for request, one in zip(requests, done, strict=True):
        with torch.no_grad():
            ids = torch.tensor([request.ids + one.ids])
            logits = setup.policy.model(ids).logits[0, len(request.ids) - 1 : -1].float() / 0.5
        own = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        assert (torch.tensor(one.logprobs) - own).abs().mean() < 2 * BF16_NATS


def test_the_server_is_compared_with_the_policy(setup_of):
    setup = setup_of(weight_sync="none", temperature=0.9)
    message = check_server(setup, sampler_of(setup), None)
    assert "has the policy's tokens and weights" in message
    with torch.no_grad():  # as one of the training before this one might be
        for layer in setup.policy.model.model.layers[:4]:
            layer.mlp.down_proj.weight.mul_(0.7)
    with pytest.raises(UsageError, match=r"other weights than the policy: its log-probs of 4 prompts differ"):
        check_server(setup, sampler_of(setup), None)


@torch.no_grad()
def change(model, parts):
    """Noise in the weights whose names have one of `parts`."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if any(part in name for part in parts):
            size = weight.std() / (8 if "embed_tokens" in name else 2)
            weight.add_(torch.randn_like(weight) * (size if size > 0 else 0.04))  # lora_B begins at zero


@pytest.mark.usefixtures("own_weights")
@pytest.mark.parametrize(
    ("way", "parts"), [("lora", ["lora_B"]), ("folder", ["down_proj"]), ("folder", ["embed_tokens", "k_proj", "norm"])]
)
def test_weights_arrive(setup_of, way, parts, work):
    """What is drawn has the log-probs of the policy that was sent last, and not of the one before."""
    adapts = {"use_peft": True, "lora_target_modules": ["all-linear"], "lora_r": 8, "dtype": "float32"}
    setup = setup_of(weight_sync=way, **(adapts if way == "lora" else {}))
    sampler, requests = sampler_of(setup), requests_of(setup)

    def send():
        sampler.sync(setup.policy.model, setup.tokenizer, work / "policy")

    send()
    assert "has the policy's tokens and weights" in check_server(setup, sampler, send)
    before = sampler.generate(requests, Sampling(8), seed=1, number=0)
    assert gap(setup.policy.model, requests, before) < BF16_NATS
    change(setup.policy.model, parts)
    assert gap(setup.policy.model, requests, before) > 3 * BF16_NATS
    send()
    after = sampler.generate(requests, Sampling(8), seed=1, number=0)
    assert gap(setup.policy.model, requests, after) < 2 * BF16_NATS


@pytest.mark.usefixtures("own_weights")
def test_a_head_that_does_not_arrive_is_noticed(setup_of, work):
    """vLLM's CPU build keeps the head that it packed when the folder does not name it, as transformers saves a tied
    one; where this fails it has been mended, and `Workers.unties` may go."""
    setup = setup_of(weight_sync="folder")
    sampler = sampler_of(setup)
    sampler.way.unties = False
    with pytest.raises(UsageError, match=r"does not take all weights that are sent to it: .* differ by \d\S* nats"):
        check_server(setup, sampler, lambda: sampler.sync(setup.policy.model, setup.tokenizer, work / "policy"))


@pytest.fixture
def exact_server(server, tmp_path):
    """vLLM in fp32 in the other one's place: in bf16 the small updates of a folder's weights would vanish."""
    server.stop()
    running = VLLMServer(SMOLLM2.path, tmp_path / "vllm.log", "--dtype", "float32")
    yield running
    running.stop()
    server.start()


@pytest.mark.parametrize("way", ["lora", "ahead", "folder"])
def test_the_reward_rises(request, way, work):
    server = request.getfixturevalue("exact_server" if way == "folder" else "server")
    rows = vllm_grpo.train(SMOLLM2.path, server.url, way, work / "out", "--max_steps", str(STEPS))
    assert len(rows) == STEPS and all(row["rollouts/failed"] == 0 for row in rows)
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    if way == "ahead":  # what is compared are two policies, one update apart
        assert [row["rollouts/off_policy_steps"] for row in rows] == [0, *[1] * (STEPS - 1)]
        assert rows[0]["sampling/sampling_logp_difference/mean"] < BF16_NATS
        assert all(row["sampling/weight/mean"] > 0.2 for row in rows)
    else:
        assert all(row["sampling/sampling_logp_difference/mean"] < BF16_NATS for row in rows)


def test_a_server_that_dies_within_a_run_costs_nothing(server, work):
    """It is killed after the second iteration, and started anew, with its own weights and no adapter."""
    words = vllm_grpo.command(SMOLLM2.path, server.url, "lora", work / "out", "--max_steps", "5")
    log, metrics = work / "grpo.log", work / "out.partial" / "metrics.jsonl"
    with log.open("w") as file:
        run = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
        server.kill()
        server.start()
        assert run.wait(600) == 0, log.read_text()
    finally:
        run.kill()
    rows = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(row["rollouts/failed"] == 0 for row in rows)
    assert all(row["sampling/sampling_logp_difference/mean"] < BF16_NATS for row in rows)
