"""Rollouts from the model itself: its log-probs, and how far they are from the trainer's."""

import json
import math

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.rollouts.config import ServerConfig
from rlhf_trainer.rollouts.generation import Sampling, generate_batch
from rlhf_trainer.rollouts.loading import make_sampler
from rlhf_trainer.rollouts.sampler import GenerationRequest, LocalSampler, mismatch

PROMPTS = [[30 + i, *range(40, 40 + i % 5)] for i in range(6)]
REQUESTS = [GenerationRequest(ids, "unused", f"row {i}") for i, ids in enumerate(PROMPTS, start=1)]


def test_local_rollouts_are_generates_with_logprobs(make_model, tokenizer):
    model, sampling = make_model("llama"), Sampling(max_new_tokens=6, temperature=0.8)
    sampler = LocalSampler(model, tokenizer, bf16=False)
    drawn = sampler.generate(REQUESTS, sampling, seed=3, number=4)
    assert drawn == generate_batch(model, tokenizer, PROMPTS, sampling, seed=3, number=4, with_logprobs=True)
    assert all(len(done.logprobs) == len(done.ids) for done in drawn)


def test_local_rollouts_are_from_the_policy_as_it_is_now(make_model, tokenizer, tmp_path):
    model, sampling = make_model("llama"), Sampling(max_new_tokens=6, temperature=0.0)
    sampler = LocalSampler(model, tokenizer, bf16=False)
    before = sampler.generate(REQUESTS, sampling, seed=0, number=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    sampler.sync(model, tokenizer, tmp_path / "free")
    assert sampler.generate(REQUESTS, sampling, seed=0, number=0) != before
    assert not (tmp_path / "free").exists()  # nothing had to travel


def test_local_rollouts_compute_in_the_precision_of_the_run(make_model, tokenizer):
    model, dtypes = make_model("llama"), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    try:
        for bf16 in (False, True):
            config = ServerConfig(output_dir="out", bf16=bf16)
            make_sampler(config, model, tokenizer).generate(REQUESTS, Sampling(1), seed=0, number=0)
    finally:
        handle.remove()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_rollouts_are_json_so_that_a_run_can_keep_them(make_model, tokenizer):
    drawn = LocalSampler(make_model("llama"), tokenizer, bf16=False).generate(REQUESTS, Sampling(4), seed=0, number=0)
    assert [type(done)(*kept) for done, kept in zip(drawn, json.loads(json.dumps(drawn)), strict=True)] == drawn


def test_mismatch_is_what_its_formulas_say():
    sampler, trainer = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -2.0, -0.25])
    metrics = mismatch(sampler, trainer.requires_grad_())
    ratios = [math.exp(-0.5), 1.0, math.exp(0.25)]
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 0.25,
            "sampling/sampling_logp_difference/max": 0.5,
            "sampling/importance_sampling_ratio/mean": sum(ratios) / 3,
            "sampling/importance_sampling_ratio/min": ratios[0],
            "sampling/importance_sampling_ratio/max": ratios[2],
            "sampling/kl": ((ratios[0] - 1 + 0.5) + 0.0 + (ratios[2] - 1 - 0.25)) / 3,
        }
    )
    json.dumps(metrics)  # a line of metrics


def test_the_expected_mismatch_is_the_exact_kl():
    """Every token weighted by its share of the sampler's draws: a thousand tokens of probabilities in tenths."""
    sampler, trainer = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    metrics = mismatch(sampler.log()[drawn], trainer.log()[drawn])
    assert metrics["sampling/kl"] == pytest.approx((sampler * (sampler / trainer).log()).sum().item(), abs=1e-6)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(
        1.0
    )  # as it is over draws of the sampler


def test_without_tokens_there_is_no_mismatch():
    assert mismatch(torch.zeros(0), torch.zeros(0)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "vllm_server_base_url": "localhost:8000"}, "must start with http"),
        ({"use_vllm": True, "vllm_server_urls": ["http://a", "b"]}, "must start with http"),
        ({"use_vllm": True, "vllm_server_base_url": "http://a", "vllm_server_urls": ["http://b"]}, "pass one of them"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "Start it beside, as rlhf serve-vllm"),
        ({"vllm_server_base_url": "http://a"}, "vllm_server_base_url is for a server: pass use_vllm"),
        ({"weight_sync": "folder"}, "weight_sync is for a server: pass use_vllm"),
        ({"server_model": "m"}, "pass use_vllm"),
        ({"vllm_server_timeout": math.nan}, "at least 0"),
        ({"server_timeout": 0.0}, "positive number of seconds"),
        ({"server_timeout": math.nan}, "positive number of seconds"),
        ({"server_retries": -1}, "at least 0"),
        ({"server_concurrency": 0}, "at least 1"),
    ],
    ids=lambda value: str(value),
)
def test_options_that_no_server_can_follow_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ServerConfig(output_dir="out", **options)
