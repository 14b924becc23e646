"""A prompt that is there several times goes through the model once, and a row that has ended no more: the tokens and
log-probs are those of transformers' `generate` on the whole batch."""

from collections import Counter

import pytest
import torch
import transformers
from transformers import GenerationConfig

from rlhf_trainer.models.lora import put_adapter
from rlhf_trainer.rollouts.generation import Sampling, cache_of_rows, generate_batch, up_to_end
from tests.trainer.conftest import LLAMA_LIKE
from tests.trainer.known_models import dice
from tests.trainer.rollouts.test_generation import trainer_logprobs

PROMPTS = [[30 + i, *range(40, 42 + i)] for i in (0, 5, 3, 1, 4, 2, 7, 6) for _ in range(2)]  # 3 to 10 tokens
STEPS = 12
GREEDY = Sampling(STEPS, temperature=0.0)
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "cohere", "phi", "granite", "minicpm3"]
WIDE = LLAMA_LIKE | {"num_hidden_layers": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def make(make_model):
    """family -> a model; every sixth token ends a completion, so that rows end after different numbers of tokens."""

    def with_ends(family):
        if family == "gemma3":  # its window is shorter than the prompts; one layer in four sees all
            torch.manual_seed(0)
            layers = ["sliding_attention"] * 3 + ["full_attention"]
            config = transformers.Gemma3TextConfig(**WIDE, sliding_window=4, layer_types=layers)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        else:
            model = make_model(family, **({"sliding_window": 4} if family == "gemma2" else {}))
        model.generation_config.eos_token_id = list(range(0, 397, 6))
        return model

    return with_ends


def plain(model, prompts, pad_id=1, bf16=False):
    """Greedy completions by transformers alone, of the batch padded on the left."""
    width = max(map(len, prompts))
    ends = sorted({*model.generation_config.eos_token_id, 1})
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model.generate(
            input_ids=torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            generation_config=GenerationConfig(
                max_new_tokens=STEPS, pad_token_id=pad_id, eos_token_id=ends, do_sample=False
            ),
        )
    return [up_to_end(row, ends) for row in out[:, width:].tolist()]


class Calls:
    """The shapes of what went through a model."""

    def __init__(self, model):
        self.shapes = []
        self.hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: self.shapes.append(tuple(inputs[0].shape))
        )

    def __enter__(self):
        return self.shapes

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(make, tokenizer, family):
    model = make(family)
    assert cache_of_rows(model) is not None
    completions = generate_batch(model, tokenizer, PROMPTS, GREEDY, seed=0, number=0)
    assert completions == plain(model, PROMPTS)
    assert len({len(done.ids) for done in completions}) > 1  # rows have ended at several steps
    assert len({tuple(done.ids) for done in completions}) > 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_logprobs_are_the_trainers_of_the_same_tokens(make, tokenizer, family, bf16):
    model, sampling = make(family), Sampling(STEPS, temperature=0.8)
    drawn = generate_batch(model, tokenizer, PROMPTS, sampling, seed=1, number=0, bf16=bf16, with_logprobs=True)
    assert len({tuple(done.ids) for done in drawn}) > 8
    assert min(len(done.ids) for done in drawn) < STEPS // 2 < max(len(done.ids) for done in drawn)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = trainer_logprobs(model, PROMPTS, drawn, 0.8)
    differences = torch.tensor([
        ours - theirs
        for done, row in zip(drawn, expected, strict=True)
        for ours, theirs in zip(done.logprobs, row, strict=True)
    ])  # fmt: skip
    if bf16:  # logits have an error of some 2^-8 of themselves
        assert differences.abs().mean() < 0.1 and differences.mean().abs() < 0.03
    else:
        assert differences.abs().max() < 2e-4


def test_bf16_draws_the_tokens_that_bf16_draws(make, tokenizer):
    model = make("llama")
    drawn = generate_batch(model, tokenizer, PROMPTS, GREEDY, seed=0, number=0, bf16=True)
    same = [ours == theirs for ours, theirs in zip(drawn, plain(model, PROMPTS, bf16=True), strict=True)]
    assert sum(same) >= 12  # a near tie may fall otherwise in another shape of batch, for a prompt's two alike


def test_an_adapter_draws_with_it(make, tokenizer):
    peft = pytest.importorskip("peft")
    model = make("llama")
    before = plain(model, PROMPTS)
    put_adapter(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    completions = generate_batch(model, tokenizer, PROMPTS, GREEDY, seed=0, number=0)
    assert completions == plain(model, PROMPTS) != before


def test_equal_prompts_are_computed_once_and_ended_rows_no_more(make, tokenizer):
    model = make("llama")
    with Calls(model) as shapes:
        completions = generate_batch(model, tokenizer, PROMPTS, Sampling(STEPS), seed=2, number=0)
    assert shapes[:2] == [(8, 9), (16, 1)]  # all but the last token of the distinct ones, then the last one of each
    rows = [size for size, length in shapes[1:] if length == 1]
    assert len(rows) == len(shapes) - 1 == max(len(done.ids) for done in completions)
    ended = [sum(len(done.ids) <= step and done.finished for done in completions) for step in range(len(rows))]
    assert len(set(rows)) > 2
    for size, gone in zip(rows, ended, strict=True):
        assert size / 2 < 16 - gone <= size  # of those computed more than half go on


def test_prompts_of_their_own_are_prefilled_as_ever(make, tokenizer):
    model, distinct = make("llama"), PROMPTS[::2]
    with Calls(model) as shapes:
        completions = generate_batch(model, tokenizer, distinct, GREEDY, seed=0, number=0)
    assert shapes[0] == (8, 10) and completions == plain(model, distinct)


def test_a_prompt_of_one_token_has_nothing_in_front_of_it(make, tokenizer):
    model, prompts = make("llama"), [[30], [30], *PROMPTS]
    assert generate_batch(model, tokenizer, prompts, GREEDY, seed=0, number=0) == plain(model, prompts)


def test_padding_and_a_prompt_that_begins_with_its_token_are_not_the_same(make, tokenizer):
    model, prompts = make("llama"), [[40, 41], [40, 41], [1, 40, 41], [1, 40, 41]]
    with Calls(model) as shapes:
        completions = generate_batch(model, tokenizer, prompts, GREEDY, seed=0, number=0)
    assert shapes[0] == (2, 2) and completions == plain(model, prompts)
    assert completions[0] != completions[2]


def test_one_new_token(make, tokenizer):
    model = make("llama")
    completions = generate_batch(model, tokenizer, PROMPTS, Sampling(1, temperature=0.0), seed=0, number=0)
    assert [done.ids for done in completions] == [done.ids[:1] for done in plain(model, PROMPTS)]


def test_completions_that_end_with_their_first_token(tokenizer):
    model = dice({1: 0.7, 10: 0.3})
    drawn = generate_batch(model, tokenizer, [[20, 21]] * 32, Sampling(40), seed=0, number=0, with_logprobs=True)
    assert 10 < sum(done.ids == [1] for done in drawn) < 32
    for done in drawn:
        assert done.finished and done.ids == [10] * (len(done.ids) - 1) + [1]
        expected = [0.3] * (len(done.ids) - 1) + [0.7]
        assert torch.tensor(done.logprobs).exp().tolist() == pytest.approx(expected, abs=1e-5)
    always = generate_batch(dice({1: 1.0}), tokenizer, [[20, 21]] * 4, Sampling(40), seed=0, number=0)
    assert [done.ids for done in always] == [[1]] * 4


def test_without_ends_all_rows_go_on(tokenizer, monkeypatch):
    monkeypatch.setattr("rlhf_trainer.rollouts.generation.end_ids", lambda model, tokenizer: [])
    drawn = generate_batch(dice({1: 0.7, 10: 0.3}), tokenizer, [[20, 21]] * 4, Sampling(9), seed=0, number=0)
    assert [(len(done.ids), done.finished) for done in drawn] == [(9, False)] * 4


def test_draws_of_rows_that_go_on_are_from_the_same_distribution(tokenizer):
    """Each token is drawn from the die, whatever rows have ended: after all have, the shares are its probabilities."""
    faces = {10: 0.5, 11: 0.3, 1: 0.2}
    model, counts, lengths = dice(faces), Counter(), []
    for number in range(20):
        for done in generate_batch(model, tokenizer, [[20, 21]] * 32, Sampling(80), seed=5, number=number):
            assert done.finished
            counts.update(done.ids)
            lengths.append(len(done.ids))
    for token, probability in faces.items():
        assert counts[token] / counts.total() == pytest.approx(probability, abs=0.035)  # 4 sigma of some 3200 draws
    assert sum(length == 1 for length in lengths) / 640 == pytest.approx(0.2, abs=0.065)


def test_draws_depend_on_seed_and_batch_number_alone(make, tokenizer):
    model, sampling = make("gemma3"), Sampling(STEPS)

    def run(seed, number):
        return generate_batch(model, tokenizer, PROMPTS, sampling, seed=seed, number=number, with_logprobs=True)

    first = run(0, 0)
    torch.rand(7)
    assert run(0, 0) == first
    assert run(0, 1) != first and run(1, 0) != first


HYBRIDS = {
    "FalconH1Config": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "Lfm2Config": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_beside_keys_and_values_go_the_plain_way(tokenizer, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**WIDE | HYBRIDS[name])).eval()
    model.generation_config.eos_token_id = list(range(0, 397, 6))
    assert cache_of_rows(model) is None
    with Calls(model) as shapes:
        completions = generate_batch(model, tokenizer, PROMPTS, GREEDY, seed=0, number=0)
    assert {size for size, _ in shapes} == {16} and completions == plain(model, PROMPTS)
