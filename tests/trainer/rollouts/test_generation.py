"""Completions: from the distribution of the options, the same on every run, whole."""

import copy
from collections import Counter

import pytest
import torch
from transformers import LlamaTokenizer

import rlhf_kernels as rk
from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.models.loading import checkpoint_gradients
from rlhf_trainer.rollouts.generation import (
    Completion,
    DrawnLogprobs,
    Sampling,
    completion_text,
    end_ids,
    generate,
    generate_batch,
    up_to_end,
)
from rlhf_trainer.training.journal import batches_of_like_length
from tests.trainer.known_models import dice

PROBABILITIES = {10: 0.5, 11: 0.3, 12: 0.15, 13: 0.05}
PROMPTS = [[30 + i, *range(40, 40 + i % 7)] for i in range(13)]  # 1 to 7 tokens


@pytest.fixture(scope="module")
def die():
    return dice(PROBABILITIES)


def shares(model, tokenizer, **sampling):
    """The share of each token in 3200 draws."""
    completions = generate(
        model, tokenizer, [[20]] * 64, Sampling(max_new_tokens=50, **sampling), batch_size=64, seed=3
    )
    counts = Counter(id for completion in completions for id in completion.ids)
    return {id: count / 3200 for id, count in sorted(counts.items())}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.0}, {10: 1.0}),
        ({"temperature": 0.5}, {10: 0.6849, 11: 0.2466, 12: 0.0616, 13: 0.0068}),  # squares, normalised
        ({"top_k": 2}, {10: 0.625, 11: 0.375}),
        ({"top_p": 0.45}, {10: 1.0}),
        ({"top_p": 0.75}, {10: 0.625, 11: 0.375}),  # the token that crosses top_p belongs to it
        ({"top_p": 0.85}, {10: 0.5263, 11: 0.3158, 12: 0.1579}),
        ({"top_k": 3, "top_p": 0.84}, {10: 0.625, 11: 0.375}),  # of the three, two have 0.842
    ],
    ids=str,
)
def test_tokens_are_drawn_by_the_options(die, tokenizer, sampling, expected):
    drawn = shares(die, tokenizer, **sampling)
    assert drawn.keys() == expected.keys()
    for id, share in expected.items():
        assert drawn[id] == pytest.approx(share, abs=0.035)  # 4 sigma of a half in 3200 draws


def test_the_models_own_settings_do_not_leak_in(die, tokenizer):
    plain = shares(die, tokenizer)
    own = die.generation_config
    changed = type(own)(
        temperature=0.1, top_k=1, top_p=0.2, min_p=0.4, repetition_penalty=5.0, no_repeat_ngram_size=2,
        min_new_tokens=40, suppress_tokens=[10], max_length=3, do_sample=True, eos_token_id=1,
    )  # fmt: skip
    die.generation_config = changed
    try:
        assert shares(die, tokenizer) == plain
        assert shares(die, tokenizer, temperature=0.0) == {10: 1.0}
        assert die.generation_config is changed
    finally:
        die.generation_config = own


def test_a_completion_ends_with_its_end(tokenizer):
    model = dice({10: 0.7, 1: 0.2, 7: 0.1})  # 1 is <|im_end|>, eos and padding of the tokenizer
    model.generation_config.eos_token_id = [7, 1]
    completions = generate(model, tokenizer, PROMPTS * 8, Sampling(max_new_tokens=6), batch_size=16, seed=0)
    assert {completion.ids[-1] for completion in completions if completion.finished} == {1, 7}
    for ids, finished, *_ in completions:
        assert set(ids[:-1]) <= {10} and len(ids) <= 6
        assert finished == (ids[-1] in (1, 7)) and (finished or len(ids) == 6)
    assert 0 < sum(not completion.finished for completion in completions) < len(completions)


def test_ends_are_those_of_model_and_tokenizer(die, tokenizer):
    own = die.generation_config.eos_token_id
    for ends, expected in ((None, [1]), (1, [1]), ([5, 9], [1, 5, 9])):
        die.generation_config.eos_token_id = ends
        assert end_ids(die, tokenizer) == expected
    die.generation_config.eos_token_id = own


def test_padding_behind_the_end_is_not_the_completions():
    assert up_to_end([4, 5, 1, 1, 1], [1]) == Completion([4, 5, 1], True)
    assert up_to_end([1, 0, 0], [1]) == Completion([1], True)
    assert up_to_end([4, 0, 5], [1]) == Completion([4, 0, 5], False)


def test_the_text_has_neither_end_nor_special_tokens(tokenizer):
    ids = tokenizer(" the cat .").input_ids
    assert completion_text(tokenizer, Completion([*ids, 1], True), [5]) == " the cat ."
    assert completion_text(tokenizer, Completion([0, *ids], False), [5]) == " the cat ."
    (fish,) = tokenizer(" fish").input_ids
    assert completion_text(tokenizer, Completion([*ids, fish], True), [5]) == " the cat ."  # an end that is a word


def test_special_tokens_that_the_tokenizer_does_not_name_are_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think> the</think> cat").input_ids
    assert completion_text(tokenizer, Completion([*ids, 1], True), [5]) == "<think> the</think> cat"


def sentencepiece():
    """Llama 2's kind: words begin with a space, and bytes stand for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *":Hia", "\u2581", "Hi", "\u2581Hi"]
    return LlamaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[("H", "i"), ("\u2581", "Hi")])


@pytest.mark.parametrize(
    ("prompt", "drawn", "text"),
    [
        ([":"], ["\u2581Hi"], " Hi"), ([":"], ["Hi"], "Hi"), (["\u2581Hi", "\u2581"], ["Hi", "\u2581Hi"], "Hi Hi"),
        (["</s>", ":"], ["\u2581Hi", "<unk>", "a"], " Hia"), ([], ["\u2581Hi"], "Hi"), ([":"], [], ""),
        (["<0xC3>", "<0xA9>"], ["<0xC3>", "<0xA8>"], "è"), (["<0xC3>"], ["<0xA9>", "a"], "\ufffda"),
        (["<0xC3>", "<0xA9>"], ["<0xC3>"], "\ufffd"), ([":"], ["a", "<0xC3>"], "a\ufffd"),
    ],
)  # fmt: skip
def test_what_is_drawn_is_decoded_in_its_place(prompt, drawn, text):
    tokenizer = sentencepiece()
    prompt, drawn = map(tokenizer.convert_tokens_to_ids, (prompt, drawn))
    assert completion_text(tokenizer, Completion([*drawn, 2], True), prompt) == text
    assert completion_text(tokenizer, Completion(drawn, False), [5] * 100 + prompt) == text or not prompt


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_greedy_completions_do_not_depend_on_the_batch(make_model, tokenizer, family):
    model = make_model(family)
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    alone = generate(model, tokenizer, PROMPTS, greedy, batch_size=1, seed=0)
    assert len({tuple(completion.ids) for completion in alone}) > 6
    assert generate(model, tokenizer, PROMPTS, greedy, batch_size=4, seed=1) == alone
    assert generate(model, tokenizer, PROMPTS[::-1], greedy, batch_size=13, seed=2) == alone[::-1]


def test_draws_depend_on_seed_and_batch_number_alone(make_model, tokenizer):
    model, sampling = make_model("llama"), Sampling(max_new_tokens=8)

    def run(seed, number):
        return generate_batch(model, tokenizer, PROMPTS, sampling, seed=seed, number=number)

    first = run(0, 0)
    torch.rand(7)
    assert run(0, 0) == first
    assert run(0, 1) != first and run(1, 0) != first
    assert run(1, 0) != run(0, 1)  # not of the sum of the two


def test_generating_leaves_torchs_own_draws_alone(make_model, tokenizer):
    model = make_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=2), batch_size=4, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_results_stay_in_the_order_of_the_prompts_whatever_was_kept(make_model, tokenizer):
    model, sampling = make_model("llama"), Sampling(max_new_tokens=4)
    kept = []

    def keep(compute):
        kept.append(compute())
        return kept[-1]

    first = generate(model, tokenizer, PROMPTS, sampling, batch_size=4, seed=0, run=keep)
    assert len(kept) == 4
    again = iter(kept)
    assert generate(model, tokenizer, PROMPTS, sampling, batch_size=4, seed=0, run=lambda _: next(again)) == first


def test_bf16_computes_in_bfloat16(make_model, tokenizer):
    model, dtypes = make_model("llama"), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    try:
        for bf16 in (False, True):
            generate(model, tokenizer, PROMPTS[:2], Sampling(max_new_tokens=1), batch_size=2, seed=0, bf16=bf16)
    finally:
        handle.remove()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_the_longest_batches_come_first():
    lengths = [3, 9, 1, 9, 4]
    batches = batches_of_like_length(lengths, 2)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert [[lengths[i] for i in batch] for batch in batches] == [[9], [4, 9], [1, 3]]
    assert batches_of_like_length([], 2) == []


# --- log-probs of what was drawn


def test_logprobs_are_of_the_distribution_drawn_from(die, tokenizer):
    """Closed forms: of the die, of its squares normalised, of its two likeliest faces."""
    faces = {
        (): PROBABILITIES,
        (("temperature", 0.5),): {10: 0.25 / 0.365, 11: 0.09 / 0.365, 12: 0.0225 / 0.365, 13: 0.0025 / 0.365},
        (("top_k", 2),): {10: 0.625, 11: 0.375},
        (("temperature", 0.5), ("top_p", 0.75)): {10: 0.25 / 0.34, 11: 0.09 / 0.34},
        (("temperature", 0.0),): PROBABILITIES,  # nothing is drawn: the model's own
    }
    for options, expected in faces.items():
        sampling = Sampling(max_new_tokens=40, **dict(options))
        (done,) = generate_batch(die, tokenizer, [[20]], sampling, seed=1, number=0, with_logprobs=True)
        assert len(done.ids) == len(done.logprobs) == 40
        assert torch.tensor(done.logprobs).exp().tolist() == pytest.approx([expected[id] for id in done.ids], abs=1e-5)


@torch.no_grad()
def trainer_logprobs(model, prompts, completions, temperature):
    """The losses' log-probs of the same tokens, one list a completion: right padding, no cache, one forward."""
    fused = FusedLM(model)
    batch = pad_sequences([(p, done.ids) for p, done in zip(prompts, completions, strict=True)], pad_id=1)

    def logprobs(hidden, head):
        targets = batch.labels[:, 1:]
        outputs = rk.linear_logprobs(hidden[:, :-1], head.weight, targets, temperature=temperature, **head.options())
        return [row[counted].tolist() for row, counted in zip(outputs.logprobs, targets != -100, strict=True)]

    return fused(batch, logprobs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "cohere", "phi", "granite"])
def test_logprobs_are_the_trainers_whatever_the_padding(make_model, tokenizer, family):
    model = make_model(family)
    for temperature in (1.0, 0.7):
        sampling = Sampling(max_new_tokens=10, temperature=temperature)
        drawn = generate_batch(model, tokenizer, PROMPTS, sampling, seed=2, number=0, with_logprobs=True)
        expected = trainer_logprobs(model, PROMPTS, drawn, temperature)
        for done, theirs in zip(drawn, expected, strict=True):
            assert done.logprobs == pytest.approx(theirs, abs=2e-4)
        without = generate_batch(model, tokenizer, PROMPTS, sampling, seed=2, number=0)
        assert without == [done._replace(logprobs=None) for done in drawn]


def test_the_end_has_its_logprob_and_padding_has_none(tokenizer):
    model = dice({10: 0.7, 1: 0.3})
    drawn = generate_batch(
        model, tokenizer, PROMPTS * 4, Sampling(max_new_tokens=6), seed=0, number=0, with_logprobs=True
    )
    ended = [done for done in drawn if done.finished and len(done.ids) < 6]
    assert len({len(done.ids) for done in ended}) > 2
    for done in ended:
        expected = [*[0.7] * (len(done.ids) - 1), 0.3]
        assert torch.tensor(done.logprobs).exp().tolist() == pytest.approx(expected, abs=1e-5)


def test_steps_that_generate_takes_back_are_not_counted():
    """It may run ahead of its stopping check."""
    drawn = DrawnLogprobs()
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for ids in ([9], [9, 0], [9, 0, 1]):
        drawn(torch.tensor([ids]), scores)
    assert drawn.of(torch.tensor([[0, 1]])).exp().tolist() == [pytest.approx([0.5, 0.25])]
    assert drawn.of(torch.tensor([[0, 1, 0]])).exp().tolist() == [pytest.approx([0.5, 0.25, 0.5])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_policy_that_checkpoints_gradients_draws_the_same(make_model, tokenizer, family):
    model, sampling = make_model(family), Sampling(max_new_tokens=8)
    plain = generate_batch(model, tokenizer, PROMPTS, sampling, seed=0, number=0, with_logprobs=True)
    checkpoint_gradients(model)
    assert generate_batch(model, tokenizer, PROMPTS, sampling, seed=0, number=0, with_logprobs=True) == plain
    assert any(module.training for module in model.modules())  # and goes on to checkpoint


def test_what_was_kept_by_a_run_that_knew_no_logprobs_is_read(die, tokenizer):
    kept = [[[10, 11], False]]
    completions = generate(die, tokenizer, [[20]], Sampling(2), batch_size=1, seed=0, run=lambda _: kept)
    assert completions == [Completion([10, 11], False, None)]
