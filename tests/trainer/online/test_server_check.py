"""A server is compared with the policy before a run draws from it: a wrong one is refused in words."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.server_check import check_server, score
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rollouts.loading import make_sampler
from tests.trainer.rollouts.scripted_server import VLLM, Scripted, choices

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")


class Scoring(Scripted):
    """Scores prompts as a model does, and returns of what it draws the log-prob `drawn`. It takes the weights that are
    in a folder, all but those whose names start with `keeps`; the head has a copy of its own, as vLLM's CPU build has
    it."""

    def __init__(self, folder):
        super().__init__()
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.drawn, self.scores, self.keeps, self.answer = 0.0, True, "nothing", self.reply

    @torch.no_grad()
    def reply(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if body is None:
            return (405 if path in VLLM else 404), b""
        if path != "/v1/completions":
            if "kwargs" in body:
                self.load(body["kwargs"]["weights_path"])
            return 200, {"success": True}
        ids = self.tokenizer(body["prompt"]).input_ids if isinstance(body["prompt"], str) else body["prompt"]
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = [None] + [{str(id): {"logprob": logprobs[i, id].item()}} for i, id in enumerate(ids[1:])]
        drawn = {"prompt_logprobs": rows if self.scores else None, "logprobs": {"token_logprobs": [self.drawn]}}
        return choices({"token_ids": [5 + i], "prompt_token_ids": ids} | drawn for i in range(body["n"]))

    def load(self, folder):
        sent = load_file(Path(folder) / "model.safetensors")
        self.model.load_state_dict({k: v for k, v in sent.items() if not k.startswith(self.keeps)}, strict=False)


@pytest.fixture
def running(task, tmp_path):
    """(change of the server, options) -> the server, what a run with it starts with, and its comparison."""
    contexts = ExitStack()

    def start(change=lambda server: None, **options):
        server = Scoring(task["model_name_or_path"])
        change(server)
        led = {
            "use_vllm": True,
            "vllm_server_base_url": contexts.enter_context(server.running()),
            "server_model": "policy",
        }
        small = {"output_dir": str(tmp_path / "out"), "num_generations": 4, "weight_sync": "none"}
        setup = prepare(GRPOConfig(**task | led | small | options))
        sampler = make_sampler(setup.config, setup.policy.model, setup.tokenizer)

        def send():
            sampler.sync(setup.policy.model, setup.tokenizer, tmp_path / "policy")

        return server, setup, lambda: check_server(setup, sampler, send)

    with contexts:
        yield start


@pytest.fixture
def compared(running):
    """(change of the server, options) -> the message."""

    def compare(change=lambda server: None, **options):
        _, setup, check = running(change, **options)
        own, rounded = score(setup)
        assert 0 < (rounded - own).abs().max() < 0.1 and not setup.policy.bf16
        return check()

    return compare


def scaled(factor):
    def change(server):
        with torch.no_grad():
            server.model.get_output_embeddings().weight.mul_(factor)

    return change


def test_the_policy_itself_passes_also_in_bf16(compared):
    for change in (lambda server: None, lambda server: server.model.bfloat16()):
        assert "has the policy's tokens and weights: log-probs differ by" in compared(change)


def test_other_weights_are_refused_with_the_difference(compared):
    with pytest.raises(UsageError, match=r"other weights than the policy: .* 4 prompts differ by \d\S* nats"):
        compared(scaled(3.0))


def test_another_tokenizer_is_refused(compared):
    def change(server):
        tokenizer = server.tokenizer
        server.tokenizer = lambda text: type("Encoded", (), {"input_ids": [2, *tokenizer(text).input_ids]})

    with pytest.raises(UsageError, match=r"another tokenizer than the policy: of '\w+.*' it makes the tokens \[2, "):
        compared(change)


def test_logprobs_from_before_the_temperature_are_refused_by_the_flag_that_is_missing(compared):
    def raw(server):
        server.drawn = -0.7

    assert "weights: log-probs differ" in compared(raw)  # at temperature 1 they are the same
    with pytest.raises(UsageError, match=r"the temperature of 0\.5.*--logprobs-mode processed_logprobs"):
        compared(raw, temperature=0.5)
    assert "weights: log-probs differ" in compared(temperature=0.5)


def test_a_server_that_scores_no_prompts_is_not_compared(compared):
    def silent(server):
        server.scores = False

    assert "was not compared with the policy: it scores no prompts" in compared(silent)

    def refuses(server):
        server.answer = lambda path, body: server.reply(path, body) if body is None else (400, b"no such field")

    assert "was not compared with the policy: HTTP 400: no such field" in compared(refuses)
    assert "it takes text" in compared(server_prompts="text")


def test_a_server_that_takes_all_weights_has_the_policys_afterwards(running):
    server, setup, check = running(weight_sync="folder")
    before = {name: weight.clone() for name, weight in setup.policy.model.state_dict().items()}
    assert "has the policy's tokens and weights" in check()
    assert [path for path, body in server.requests if path == "/collective_rpc" and body] == ["/collective_rpc"] * 2
    for model in (setup.policy.model, server.model):
        assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("part", ["lm_head", "transformer.ln_f", ""])
def test_a_server_that_keeps_some_of_its_weights_is_refused(running, part):
    """And the policy is as it was."""
    _, setup, check = running(lambda server: setattr(server, "keeps", part), weight_sync="folder")
    before = {name: weight.clone() for name, weight in setup.policy.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"does not take all weights .* differ by \d\S* nats .* weight_sync lora"):
        check()
    assert all(weight.equal(before[name]) for name, weight in setup.policy.model.state_dict().items())


def test_a_run_does_not_begin_with_it(running):
    _, setup, _ = running(lambda server: setattr(server, "keeps", "lm_head"), weight_sync="folder")
    with pytest.raises(UsageError, match=r"weight_sync folder: .* does not take all weights"):
        train_grpo(setup.config)
