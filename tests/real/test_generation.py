"""Greedy completions of real models, prompts computed once and ended rows left out, are those of transformers alone."""

import pytest
import torch
from transformers import GenerationConfig

from rlhf_trainer.rollouts.generation import Sampling, cache_of_rows, end_ids, generate_batch, up_to_end
from tests.real.real_models import load
from tests.real.shared_prompts import TEXT, batches

pytestmark = pytest.mark.real
STEPS = 24


@pytest.fixture(scope="module")
def loaded(model):
    return load(model.path)


def plain(model, tokenizer, prompts):
    """By `generate` of the batch padded on the left."""
    width, ends = max(map(len, prompts)), end_ids(model, tokenizer)
    settings = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [up_to_end(row, ends) for row in out[:, width:].tolist()]


@pytest.mark.parametrize("words", [150, 700])  # Gemma 3's window is 512 tokens
def test_a_group_of_a_long_prompt(loaded, words):
    policy, tokenizer = loaded
    assert cache_of_rows(policy) is not None
    prompts = [tokenizer((TEXT * 4)[:length]).input_ids for length in (5 * words, 5 * words - 50) for _ in range(2)]
    drawn = generate_batch(policy, tokenizer, prompts, Sampling(STEPS, temperature=0.0), seed=0, number=0)
    assert drawn == plain(policy, tokenizer, prompts)


def test_questions_whose_answers_end_at_different_steps(model, loaded):
    policy, tokenizer = loaded
    prompts = [prompt for prompt in batches(model, tokenizer)["questions"][0] for _ in range(2)]
    drawn = generate_batch(policy, tokenizer, prompts, Sampling(STEPS, temperature=0.0), seed=0, number=0)
    assert drawn == plain(policy, tokenizer, prompts)
    if model.knows_end:
        assert len({len(done.ids) for done in drawn}) > 2
