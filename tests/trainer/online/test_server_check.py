"""A server is compared with the policy before a run draws from it: a wrong one is refused in words."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.errors import UsageError
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.server_check import check_server, prompt_logprobs
from rlhf_trainer.online.setup import prepare
from rlhf_trainer.rollouts.loading import make_sampler
from tests.trainer.rollouts.scripted_server import Scripted, choice

pytestmark = pytest.mark.usefixtures("loopback_without_proxy")


class Scoring(Scripted):
    """Scores prompts as a model does, and returns of what it draws the log-prob `drawn`."""

    def __init__(self, folder):
        super().__init__()
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.drawn, self.scores, self.answer = 0.0, True, self.reply

    @torch.no_grad()
    def reply(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        ids = self.tokenizer(body["prompt"]).input_ids
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = [None] + [{str(id): {"logprob": logprobs[i, id].item()}} for i, id in enumerate(ids[1:])]
        return choice(
            token_ids=[7], prompt_token_ids=ids, prompt_logprobs=rows if self.scores else None,
            logprobs={"tokens": ["?"], "token_logprobs": [self.drawn]},
        )  # fmt: skip


@pytest.fixture
def compared(task, tmp_path):
    """(change of the server, options) -> the message."""

    def compare(change=lambda server: None, **options):
        server = Scoring(task["model_name_or_path"])
        change(server)
        with server.running() as url:
            config = GRPOConfig(
                **task | {"output_dir": str(tmp_path / "out")}, num_generations=4, use_vllm=True, weight_sync="none",
                vllm_server_base_url=url, server_model="policy", **options,
            )  # fmt: skip
            setup = prepare(config)
            own, rounded = prompt_logprobs(setup, setup.prompts[0].ids)
            assert 0 < (rounded - own).abs().max() < 0.1 and not setup.policy.bf16
            return check_server(setup, make_sampler(config, setup.policy.model, setup.tokenizer))

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
