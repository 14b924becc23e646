"""Batches packed as transformers packs them, through a real model: what padded rows and the model itself say.

The model keeps packed sequences apart by their position_ids alone, as it does when it is given no attention mask.
"""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import rlhf_kernels as rk

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `trainer`)")

LENGTHS = (5, 11, 1, 8)
LIMIT = 1e-4
KINDS = ["cu_seqlens", "position_ids"]


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, attn_implementation=request.param,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(67, (length,), generator=generator) for length in LENGTHS]


def packed_batch():
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    features = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in sequences()]
    return collate(features)


def hidden_of(model, **inputs):
    return model.model(**inputs, use_cache=False).last_hidden_state


def packed_arguments(model, kind):
    """Arguments of both functions: hidden [1, N, D], weight, labels [1, N], and where the sequences are."""
    batch = packed_batch()
    hidden = hidden_of(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    packing = {"cu_seqlens": batch["cu_seq_lens_q"]} if kind == "cu_seqlens" else {kind: batch["position_ids"]}
    return (hidden, model.lm_head.weight, batch["labels"]), packing


def padded_arguments(model):
    ids, labels = (pad_sequence(sequences(), batch_first=True, padding_value=value) for value in (0, -100))
    return hidden_of(model, input_ids=ids, attention_mask=(labels != -100).long()), model.lm_head.weight, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_sequence_logprobs_of_a_packed_batch(model, kind):
    """The log-probs are those of each sequence alone, from full logits, and those of padded rows."""
    args, packing = packed_arguments(model, kind)
    got = rk.sequence_logprobs(*args, **packing)
    padded = rk.sequence_logprobs(*padded_arguments(model))
    alone = []
    for ids in sequences():
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        alone.append(logp.gather(-1, ids[1:, None]).sum())
    assert_close(got.logprobs, torch.stack(alone))
    assert_close(got.logprobs, padded.logprobs)
    assert got.token_counts.tolist() == padded.token_counts.tolist() == [length - 1 for length in LENGTHS]
    upstream = torch.arange(1.0, len(LENGTHS) + 1)
    assert_close(
        gradients(model, (got.logprobs * upstream).sum()), gradients(model, (torch.stack(alone) * upstream).sum())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_loss_of_a_packed_batch(model, kind):
    ref_logps = torch.tensor([-30.0, -50.0, 0.0, -40.0])
    args, packing = packed_arguments(model, kind)
    got = rk.linear_dpo_loss(*args, ref_logps, **packing)
    padded = rk.linear_dpo_loss(*padded_arguments(model), ref_logps)
    assert_close(got.loss, padded.loss)
    grads = [gradients(model, out.loss) for out in (got, padded)]
    assert grads[1].norm() > 0.1
    assert_close(grads[0].norm(), grads[1].norm())
    assert_close(*grads)
