"""One pass over a prompt for all its responses, and rows without padding, give what a padded row for each gives."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from rlhf_trainer.data.examples import Group
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.offline.pair_batches import collate_flat, collate_groups
from rlhf_trainer.offline.reference_logprobs import sequence_logprobs
from rlhf_trainer.offline.shared_prefix import can_share, collate_shared

GROUPS = [
    Group(1, [5, 6, 7, 8, 9], [[11, 12, 13], [14], [15, 16]], [(0, 1), (2, 1)], [0.0, 0.0]),
    Group(2, [21, 22], [[23, 24, 25, 26], [23, 24, 27]], [(1, 0)], [0.5]),
]
SHARING = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen3", "sdpa"),
    ("gpt2", "eager"),
    ("gpt2", "sdpa"),
    ("phi", "sdpa"),
]


def test_rows_by_hand():
    pairs = collate_shared(GROUPS, 0, "sdpa")
    ids, mask, _, positions, real = pairs.batch
    assert ids.tolist() == [[5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26, 23, 24, 27, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 6], [0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 0]]
    assert real.tolist() == [[1] * 11, [1] * 9 + [0] * 2]
    attended = mask[0, 0]
    assert attended[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8], "the prompt and itself"
    assert attended[10].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 9, 10]
    assert attended[2].nonzero().flatten().tolist() == [0, 1, 2], "the prompt sees no response"
    assert pairs.labels.tolist()[1] == [-100, 14, -100, -100, -100]
    assert pairs.gather[1, :2].tolist() == [4, 8], "the prompt's last token, then the response's"
    assert pairs.gather[3].tolist() == [11 + 1, 11 + 2, 11 + 3, 11 + 4, 11 + 5]
    assert (pairs.chosen_idxs.tolist(), pairs.rejected_idxs.tolist()) == ([0, 2, 4], [1, 1, 3])


@pytest.mark.parametrize(("family", "attention"), SHARING)
@torch.no_grad()
def test_log_probs_are_those_of_a_row_for_each(family, attention, make_model):
    model = make_model(family)
    model.set_attn_implementation(attention)
    assert can_share(model)
    fused = FusedLM(model)
    shared = sequence_logprobs(fused, collate_shared(GROUPS, 1, attention))
    plain = sequence_logprobs(fused, collate_groups(GROUPS, 1))
    assert shared.std() > 1
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
@torch.no_grad()
def test_log_probs_without_padding_are_those_of_padded_rows(family, make_model):
    """Also longer than Gemma 2's window of 16 tokens."""
    groups = [*GROUPS, Group(3, list(range(30, 50)), [list(range(50, 75)), [9]], [(0, 1)], [0.0])]
    fused = FusedLM(make_model(family))
    flat = collate_flat(groups, 1)
    assert flat.batch.input_ids.shape == (1, sum(len(g.prompt) + len(r) for g in groups for r in g.responses))
    plain = sequence_logprobs(fused, collate_groups(groups, 1))
    assert plain.std() > 1
    torch.testing.assert_close(sequence_logprobs(fused, flat), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_trains_without_padding(dtype, model_folder, rows, write_jsonl, train):
    """Under autocast, in which an adapter leaves its inputs as they are: the model is tried as it will be run."""
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(4)), "use_peft": True}
    metrics = train(**common, bf16=True, dtype=dtype, padding_free=True, num_train_epochs=1)[1]
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=2e-2)


def test_a_model_whose_rows_leak_is_refused(tokenizer, rows, write_jsonl, train, tmp_path):
    """Bloom knows no positions."""
    config = BloomConfig(vocab_size=397, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    with pytest.raises(UsageError, match=r"padding_free: in BloomForCausalLM .* Leave padding_free off"):
        train(model_name_or_path=str(tmp_path / "bloom"), dataset_name=write_jsonl(rows(4)), padding_free=True)


def test_a_model_that_cannot_is_refused(make_model, model_folder, rows, write_jsonl, train):
    """Gemma 2's window of 16 tokens is lost to a mask of one's own."""
    assert not can_share(make_model("gemma2"))
    with pytest.raises(UsageError, match="share_prefix: the attention of model_name_or_path"):
        train(model_name_or_path=model_folder("gemma2"), dataset_name=write_jsonl(rows(4)), share_prefix=True)


def test_training_is_the_same(model_folder, rows, write_jsonl, train):
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(8)), "num_train_epochs": 4}
    layouts = ({}, {"share_prefix": True}, {"padding_free": True})
    plain, shared, flat = (train(**common, **layout)[1] for layout in layouts)
    assert plain[3]["loss"] < plain[0]["loss"] - 0.05
    for a, b in (*zip(plain, shared, strict=True), *zip(plain, flat, strict=True)):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key


def test_several_pairs_a_prompt_are_the_pairs_apart(model_folder, rows, write_jsonl, train):
    """Three ranked responses as one row of three pairs, or as three rows: the same loss and gradient."""
    made = [row | {"third": other["chosen"]} for row, other in zip(rows(4), rows(4, seed=5), strict=True)]
    together = [
        {
            "prompt": r["prompt"],
            "responses": [r["chosen"], r["rejected"], r["third"]],
            "pairs": [[0, 1], [0, 2], [1, 2]],
        }
        for r in made
    ]
    order = [("chosen", "rejected"), ("chosen", "third"), ("rejected", "third")]
    apart = [{"prompt": r["prompt"], "chosen": r[a], "rejected": r[b]} for r in made for a, b in order]
    common = {"model_name_or_path": model_folder("llama"), "batch_size": 12, "micro_batch_size": 6}
    common |= {"num_train_epochs": 3}
    one = train(**common, dataset_name=write_jsonl(together, "together.jsonl"))[1]
    two = train(**common, dataset_name=write_jsonl(apart, "apart.jsonl"))[1]
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/rejected"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key
