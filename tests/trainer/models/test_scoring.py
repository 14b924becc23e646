"""Rewards: the model's own, at the last real token, whatever is padded with and whoever shares the batch."""

import copy

import pytest
import torch
import transformers

from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.scoring import batch_count, load_reward_model, score_sequences, value_head_of
from tests.trainer.known_models import save_word_reward_model

EOS, UNUSED = 1, 396
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sequences():
    """Sequences of 2 to 30 tokens, all with the end-of-sequence token at their end, and one with two of them."""
    generator = torch.Generator().manual_seed(0)
    draw = [[*torch.randint(3, 390, (1 + i,), generator=generator).tolist(), EOS] for i in (9, 0, 29, 4, 4, 17, 1)]
    return [*draw, [5, EOS, 8, EOS]]


@pytest.fixture(scope="module")
def make_reward_model(make_model):
    def make(family, **changes):
        config = copy.deepcopy(make_model(family).config)
        config.update({"num_labels": 1} | changes)
        torch.manual_seed(1)
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()

    return make


@torch.no_grad()
def own_rewards(model, sequences):
    """Rewards by the model's own forward, one at a time, with a padding token that is in none of them."""
    config = model.config
    before, config.pad_token_id = config.pad_token_id, UNUSED
    try:
        return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    finally:
        config.pad_token_id = before


@pytest.mark.parametrize("pad_token_id", [EOS, None, 2], ids=["pad-is-eos", "no-pad", "own-pad"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_rewards_are_the_models_own(make_reward_model, sequences, family, pad_token_id):
    model = make_reward_model(family, pad_token_id=pad_token_id)
    expected = own_rewards(model, sequences)
    assert expected.std() > 0.1
    for batch_size in (1, 3, 8):
        for pad_id in (EOS, 2):
            scores = score_sequences(model, sequences, batch_size, pad_id, CPU)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_other_sequences_and_the_order_do_not_matter(make_reward_model, sequences):
    model = make_reward_model("llama")
    scores = score_sequences(model, sequences, 3, EOS, CPU)
    some = [5, 0, 2]
    torch.testing.assert_close(
        score_sequences(model, [sequences[i] for i in some], 2, EOS, CPU), scores[some], rtol=0, atol=1e-5
    )


def test_equal_sequences_get_equal_rewards_to_the_bit_and_are_scored_once(make_reward_model, sequences):
    repeated = sequences * 3
    runs = []

    def count(compute):
        runs.append(compute())
        return runs[-1]

    scores = score_sequences(make_reward_model("llama"), repeated, 3, EOS, CPU, run=count).view(3, -1)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert len(runs) == batch_count(repeated, 3) == 3
    assert sorted(map(len, runs)) == [2, 3, 3]


def test_nothing_to_score(make_reward_model):
    assert score_sequences(make_reward_model("llama"), [], 3, EOS, CPU).shape == (0,)


def test_bf16_is_near_and_rewards_are_not_rounded_to_it(make_reward_model, sequences):
    model = make_reward_model("llama")
    scores = score_sequences(model, sequences, 3, EOS, CPU)
    low = score_sequences(model, sequences, 3, EOS, CPU, bf16=True)
    assert (low - scores).abs().max() < 0.1 * scores.std()
    assert not torch.equal(low, scores) and not torch.equal(low, low.bfloat16().float())


def test_a_reward_that_is_not_a_number_stops(make_reward_model, sequences):
    model = make_reward_model("llama")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
        with pytest.raises(UsageError, match="its forward gives nan"):
            score_sequences(model, sequences, 3, EOS, CPU)
        model = make_reward_model("llama")
        model.model.embed_tokens.weight[sequences[2][3]] = float("inf")
    with pytest.raises(UsageError, match=r"the reward model gives nan for 1 of 8 sequences"):
        score_sequences(model, sequences, 3, EOS, CPU)


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_is_loaded_as_it_was_saved_without_dropout(dtype, make_reward_model, sequences, tmp_path):
    model = make_reward_model("gpt2")  # its dropout is 0.1
    model.to(dtype).save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path), key="reward_model")
    assert loaded.dtype == dtype and not loaded.training
    assert torch.equal(score_sequences(loaded, sequences, 4, EOS, CPU), score_sequences(loaded, sequences, 4, EOS, CPU))


def test_rewards_of_a_bf16_model_are_not_rounded_to_bf16(make_reward_model, sequences):
    """Its hidden states are, but not what the head makes of them."""
    model = make_reward_model("llama").to(torch.bfloat16)
    rewards = score_sequences(model, sequences, 4, EOS, CPU)
    assert not torch.equal(rewards, rewards.bfloat16().float())
    with torch.no_grad():
        for ids, reward in zip(sequences, rewards, strict=True):
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert reward.item() == pytest.approx((hidden.double() @ model.score.weight[0].double()).item(), rel=2e-2)


def test_a_language_model_is_not_a_reward_model(model_folder):
    with pytest.raises(UsageError, match=r"reward_model: .* lacks weights, .* random: score.weight.*`rlhf reward`"):
        load_reward_model(model_folder("llama"), key="reward_model")


def test_a_classifier_of_two_classes_is_not_a_reward_model(make_reward_model, tmp_path):
    make_reward_model("llama", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"reward_model: .* gives 2 values a sequence; a reward model gives 1"):
        load_reward_model(str(tmp_path), key="reward_model")


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="reward_model: no such folder"):
        load_reward_model(str(tmp_path / "none"), key="reward_model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"reward_model: cannot load .* as a reward model"):
        load_reward_model(str(tmp_path), key="reward_model")


SMALL_BERT = {
    "vocab_size": 397, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_labels": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("BertConfig", "only models whose reward is that can be used"),  # reads its first token, through a pooler
        ("DebertaV2Config", "expected a causal model"),
        ("RobertaConfig", "expected one linear layer with one output on top, got 0"),
    ],
)
def test_an_encoder_is_refused(config, message, tmp_path):
    config = getattr(transformers, config)(**SMALL_BERT)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"reward_model: .*{message}"):
        load_reward_model(str(tmp_path), key="reward_model")


def test_a_model_that_changes_its_rewards_is_refused(make_reward_model):
    """A forward that scales, say, after the head: what the head gives would not be the model's reward."""
    model = make_reward_model("llama")
    forward = model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(UsageError, match="its forward gives"):
        value_head_of(model)


def test_the_reward_model_of_the_other_tests_rewards_the_share_of_a_word(tokenizer, tmp_path):
    model = load_reward_model(save_word_reward_model(tmp_path, copy.deepcopy(tokenizer), " cat"), key="reward_model")
    cat, dog = tokenizer(" cat").input_ids, tokenizer(" green").input_ids
    texts = [dog * 4, cat + dog * 3, cat * 2 + dog * 2, dog + cat * 3, cat * 4]
    rewards = score_sequences(model, [[*ids, EOS] for ids in texts], 2, EOS, CPU)
    assert rewards[0] == 0 and (rewards.diff() > 0.1).all()
