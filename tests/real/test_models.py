"""What `make real` made is the models that it should be, and their log-probs are those of their own logits."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import LogitOptions, patch_causal_lm, run_in_head
from rlhf_kernels.testing import assert_no_worse_than_eager
from tests.real.real_models import CONVERSATIONS, GEMMA3, IGNORED, SMOLLM2, load, user

pytestmark = pytest.mark.real
TEXT = "Ada: 2+2=4, don't you think?\n\nWell, naïve  words 🙂"


def tokenizer_of(model):
    return AutoTokenizer.from_pretrained(model.path)


def test_every_text_comes_back(model):
    tokenizer = tokenizer_of(model)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT


def test_generation_stops_where_the_tokenizer_says(model):
    generation, tokenizer = GenerationConfig.from_pretrained(model.path), tokenizer_of(model)
    assert (generation.bos_token_id, generation.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_smollm2_speaks_its_own_template():
    tokenizer = tokenizer_of(SMOLLM2)
    assert len(tokenizer) == 49_152
    assert tokenizer.convert_ids_to_tokens(tokenizer("a b").input_ids) == ["a", "Ġb"]  # byte-level, and no BOS
    assert tokenizer.eos_token == "<|im_end|>"
    assert "generation %}" not in tokenizer.chat_template
    for messages in CONVERSATIONS:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == SMOLLM2.rendered(messages)
    prompt = tokenizer.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True)
    assert prompt == SMOLLM2.rendered([user("Hi")]) + "<|im_start|>assistant\n"


def test_gemma_puts_bos_in_front_and_has_no_template():
    tokenizer = tokenizer_of(GEMMA3)
    assert len(tokenizer) == 262_144
    assert tokenizer.convert_ids_to_tokens(tokenizer("a b").input_ids) == ["<bos>", "a", "▁b"]
    assert tokenizer.eos_token == "<eos>"
    assert tokenizer.chat_template is None


@pytest.fixture(scope="module")
def loaded(model):
    return load(model.path)


@pytest.fixture(scope="module")
def batch(model, loaded):
    """Conversations as a padded batch; labels are all its tokens."""
    tokenizer = loaded[1]
    texts = [model.rendered(messages) for messages in CONVERSATIONS]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    return inputs, inputs.input_ids.masked_fill(inputs.attention_mask == 0, IGNORED)


@torch.no_grad()
def test_logprobs_are_those_of_the_models_own_logits(loaded, batch):
    """As exact as fp32 log_softmax of them; the truth is fp64 from the same hidden states."""
    model, (inputs, labels) = loaded[0], batch
    targets = labels[:, 1:].clamp(min=0)[..., None]
    counted = labels[:, 1:] != IGNORED

    def use(hidden, head):
        options = {"bias": head.bias, "logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}
        tokens = rk.linear_logprobs(hidden[:, :-1], head.weight, labels[:, 1:], **options).logprobs
        weight = head.weight.double()
        exact = [row.double().matmul(weight.T).log_softmax(-1) for row in hidden[:, :-1]]
        truth = torch.stack([row.gather(-1, target)[:, 0] for row, target in zip(exact, targets, strict=True)])
        return tokens, rk.sequence_logprobs(hidden, head.weight, labels, **options), truth

    (tokens, sequences, truth), _ = run_in_head(model, use, LogitOptions(), {**inputs, "use_cache": False})
    eager = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
    assert_no_worse_than_eager(tokens[counted], eager[counted], truth[counted], "a token's log-prob")
    sums = [values.where(counted, 0.0).sum(1) for values in (eager, truth)]
    assert_no_worse_than_eager(sequences.logprobs, *sums, "a sequence's log-prob")
    assert sequences.token_counts.tolist() == counted.sum(1).tolist()


@torch.no_grad()
def test_a_patched_model_returns_them(model, loaded, batch):
    plain, (inputs, labels) = loaded[0], batch
    eager = plain(**inputs).logits[:, :-1].double().log_softmax(-1)
    expected = eager.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0].where(labels[:, 1:] != IGNORED, 0.0)
    del eager
    result = patch_causal_lm(load(model.path)[0])(**inputs, labels=labels)
    torch.testing.assert_close(result.logprobs[:, :-1].double(), expected, rtol=0, atol=2e-5)
    assert result.loss.item() == pytest.approx(
        -expected.sum().item() / (labels[:, 1:] != IGNORED).sum().item(), abs=1e-5
    )
