"""Packed conversations: every one in one row, no row too long, and none sees another under any attention."""

import random

import pytest
import torch
import transformers

from rlhf_trainer.data.batches import IGNORED, collate_sequences
from rlhf_trainer.data.examples import TokenSequence
from rlhf_trainer.offline.packing import collate_packed, leaks, plan_packing

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "cohere", "phi")
ATTENTIONS = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")]
ATTENTIONS.remove(("gemma2", "sdpa"))  # transformers has none for it
CLOSE = {"atol": 1e-5, "rtol": 0}


def conversations(lengths, seed=0, vocabulary=380):
    rng = random.Random(seed)
    return [
        TokenSequence(
            row, [rng.randrange(vocabulary) for _ in range(length)], [rng.random() < 0.6 for _ in range(length)]
        )
        for row, length in enumerate(lengths, start=1)
    ]


# --- the plan


def naive_first_fit(lengths, max_length):
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= max_length:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 200])
def test_the_plan_is_first_fit_decreasing(count):
    rng = random.Random(count)
    lengths = [rng.choice([1, 3, 8, 20, 31, 32]) for _ in range(count)]
    assert plan_packing(lengths, 32) == naive_first_fit(lengths, 32)


def test_a_plan_by_hand():
    assert plan_packing([3, 7, 2, 5, 10, 3], 10) == [[4], [1, 0], [3, 5, 2]]
    assert plan_packing([4, 4, 4], 4) == [[0], [1], [2]]
    assert plan_packing([], 8) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_conversation_is_in_one_row_and_no_row_is_too_long(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(300)]
    plan = plan_packing(lengths, 50)
    assert sorted(i for row in plan for i in row) == list(range(300))
    filled = sorted(sum(lengths[i] for i in row) for row in plan)
    assert filled[-1] <= 50 < filled[0] + filled[1]  # nor could any two be one


def test_a_conversation_that_fits_no_row():
    with pytest.raises(ValueError, match=r"lengths\[1\] is 11, over max_length=10"):
        plan_packing([5, 11], 10)


# --- the batch


def test_a_packed_batch_token_by_token():
    one = TokenSequence(1, [11, 12, 13], [True, False, True])
    two = TokenSequence(2, [21, 22], [True, True])
    three = TokenSequence(3, [31, 32], [False, True])
    batch = collate_packed([[one, two], [three]], pad_id=7)
    x = IGNORED
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [31, 32, 7, 7, 7]]
    assert batch.labels.tolist() == [[x, x, 13, x, 22], [x, 32, x, x, x]]  # 13 does not predict 21
    assert batch.attention_mask is None  # else transformers would not look at positions
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    moved = batch.to(torch.device("meta"))
    assert moved.attention_mask is None and moved.position_ids.device.type == "meta"


# --- the model: what it says of a packed conversation is what it says of it alone


def model_of(make_model, family, attention):
    model = make_model(family)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    return model


def picked(model, batch):
    """log-probs of the labels, in the batch's order."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    targets = batch.labels[:, 1:]
    learned = targets != IGNORED
    return logits[:, :-1].log_softmax(-1)[learned].gather(-1, targets[learned][:, None])[:, 0]


def alone(model, sequences):
    parts = []
    for sequence in sequences:
        batch = collate_sequences([sequence], pad_id=1)
        parts.append(picked(model, batch))
    return torch.cat(parts)


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_packed_conversations_have_the_log_probs_of_each_alone(family, attention, make_model):
    """Lengths on both sides of gemma2's window of 16, conversations of one token, rows with padding and without."""
    model = model_of(make_model, family, attention)
    sequences = conversations([30, 20, 1, 5, 17, 1, 2, 40])
    rows = [sequences[:5], sequences[5:7], sequences[7:]]
    with torch.no_grad():
        packed = picked(model, collate_packed(rows, pad_id=1))
        assert packed.numel() > 40
        torch.testing.assert_close(packed, alone(model, sequences), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_conversation_a_row_of_equal_lengths(family, make_model):
    """transformers then sees no packing at all, and no mask: plain causal attention is right."""
    model, sequences = make_model(family), conversations([19, 19])
    with torch.no_grad():
        packed = picked(model, collate_packed([[s] for s in sequences], pad_id=1))
        torch.testing.assert_close(packed, alone(model, sequences), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_gradients_are_the_sum_of_each_alone(family, make_model):
    model, sequences = make_model(family), conversations([20, 9, 12, 3])
    names = [name for name, _ in model.named_parameters()]
    packed = picked(model, collate_packed([sequences[:3], sequences[3:]], pad_id=1)).sum()
    of_packed = torch.autograd.grad(packed, list(model.parameters()))
    of_each = torch.autograd.grad(alone(model, sequences).sum(), list(model.parameters()))
    for name, ours, theirs in zip(names, of_packed, of_each, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)


def test_an_attention_mask_would_undo_it(make_model):
    """Why a packed batch goes without one; and the tests above would notice."""
    model, sequences = make_model("llama"), conversations([20, 20])
    batch = collate_packed([sequences], pad_id=1)
    masked = batch._replace(attention_mask=torch.ones_like(batch.input_ids))
    with torch.no_grad():
        assert (picked(model, masked) - alone(model, sequences)).abs().max() > 0.1


# --- the probe


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_no_leak_is_found_where_there_is_none(family, attention, make_model):
    assert not leaks(model_of(make_model, family, attention))


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_bf16_is_no_leak(family, make_model):
    with torch.autocast("cpu", torch.bfloat16):
        assert not leaks(make_model(family))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 101}
LEAKY = {
    "FalconConfig": SMALL | {"num_attention_heads": 4},  # rotates by positions, but masks without them
    "OPTConfig": SMALL | {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomConfig": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101},  # takes no positions
    "MambaConfig": SMALL | {"state_size": 8},  # carries a state from token to token
}


@pytest.mark.parametrize("config", LEAKY)
def test_a_leak_is_found(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**LEAKY[config])).eval()
    assert leaks(model)


def test_a_model_without_positions_leaks(make_model):
    model = make_model("llama")
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache)
    assert leaks(model)


def test_a_model_that_says_nan_is_not_trusted(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert leaks(model)


def test_rows_that_are_kept_apart_only_one_at_a_time_leak(make_model):
    """Flash attention does so: it reads packing from positions where the batch has one row."""
    model = make_model("llama")
    forward = model.forward

    def one_row_at_a_time(input_ids, position_ids, use_cache):
        return forward(input_ids, position_ids=position_ids if len(input_ids) == 1 else None, use_cache=use_cache)

    model.forward = one_row_at_a_time
    assert leaks(model)
