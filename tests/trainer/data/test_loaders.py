"""Conversations, prompts and labelled completions: what of each kind of row is read, learned, cut and refused."""

import copy
from pathlib import Path

import pytest

from rlhf_trainer.data.batches import IGNORED, collate_sequences
from rlhf_trainer.data.encoding import Codec, encode_conversation, encode_prompt
from rlhf_trainer.data.examples import TokenSequence, load_conversations, load_groups, load_prompts
from rlhf_trainer.errors import UsageError
from tests.trainer.messages import assistant, user

DATA = Path(__file__).parent / "files"


# --- conversations


def learned(tokenizer, sequence):
    """The conversation as text; what is learned stands in brackets."""
    pieces = []
    for i, mark in zip(sequence.ids, sequence.counted, strict=True):
        piece = tokenizer.decode([i])
        pieces.append(f"[{piece}]" if mark else piece)
    return "".join(pieces).replace("][", "")


def test_conversations_from_every_kind_of_row(chatml):
    data = load_conversations(str(DATA / "conversations.jsonl"), Codec(chatml), split="train", max_length=200)
    head = "<|im_start|>system\nbe green<|im_end|>\n<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    assert [learned(chatml, sequence) for sequence in data.examples] == [
        head + "[sat<|im_end|>]\n<|im_start|>user\non what?<|im_end|>\n<|im_start|>assistant\n[a mat<|im_end|>]\n",
        "the cat[ sat on a mat<|im_end|>]",
        "<|im_start|>user\nthe dogs?<|im_end|>\n<|im_start|>assistant\n[ran far<|im_end|>]",
        "the cat[ sat<|im_end|>]",  # of a pair, the chosen response
        "f[ish ate fish<|im_end|>]",  # a text whole, but for its first token, which nothing predicts
    ]
    assert [sequence.row for sequence in data.examples] == [1, 2, 3, 4, 5]
    assert data.report("f") == "f: 5 conversations"


def test_only_the_last_turn(chatml):
    (first, *_) = load_conversations(
        str(DATA / "conversations.jsonl"), Codec(chatml), split="train", max_length=200, last_turn_only=True
    ).examples
    text = learned(chatml, first)
    assert text.count("[") == 1 and text.endswith("assistant\n[a mat<|im_end|>]\n")


def test_the_whole_conversation(chatml):
    """Messages are learned whole; of prompts with completions, still the completion alone."""
    options = {"split": "train", "max_length": 200}
    sequences = load_conversations(str(DATA / "conversations.jsonl"), Codec(chatml), **options).examples
    whole = load_conversations(
        str(DATA / "conversations.jsonl"), Codec(chatml), **options, assistant_only_loss=False
    ).examples
    assert [sequence.ids for sequence in whole] == [sequence.ids for sequence in sequences]
    assert whole[0].counted == [False] + [True] * (len(whole[0].ids) - 1)  # nothing predicts the first token
    assert whole[1:] == sequences[1:]


def test_fine_tuning_on_pairs_learns_the_tokens_that_dpo_compares(chatml):
    for name in ("hh", "tldr"):
        source = str(DATA / f"{name}.jsonl")
        sequences = load_conversations(source, Codec(chatml), split="train", max_length=300).examples
        groups = load_groups(source, Codec(chatml), split="train", max_prompt_length=200, max_length=300).examples
        for sequence, group in zip(sequences, groups, strict=True):
            ((better, _),) = group.pairs
            chosen = group.responses[better]
            assert sequence.ids == group.prompt + chosen
            assert sequence.counted == [False] * len(group.prompt) + [True] * len(chosen)


def test_a_conversation_loses_its_end_and_the_loss_is_counted(chatml, write_jsonl):
    messages = [*user("a"), *assistant("the cat"), *user("a"), *assistant("the mat")]
    whole, counted = encode_conversation(Codec(chatml), messages)
    path = write_jsonl([{"messages": messages}, {"prompt": "a", "completion": " mat"}])
    for length in (len(whole), len(whole) - 1, counted.index(True) + 1):
        data = load_conversations(path, Codec(chatml), split="train", max_length=length)
        assert data.examples[0] == TokenSequence(1, whole[:length], counted[:length])
        assert data.cut == (length < len(whole))
    assert data.report("f") == "f: 2 conversations, 1 sequences cut at max_length"


def test_nothing_left_to_learn(chatml, write_jsonl):
    rows = [
        {"messages": [*user("the cat " * 30), *assistant("a")]},
        {"prompt": "the cat " * 30, "completion": " mat"},
        {"prompt": "a", "completion": " mat"},
    ]
    path = write_jsonl(rows)
    with pytest.raises(UsageError, match=r"2 of 3 rows") as error:
        load_conversations(path, Codec(chatml), split="train", max_length=40)
    for number, field in ((1, "messages"), (2, "completion")):
        problem = (
            rf"row {number}, field '{field}': no token is left to learn, after cutting \d+ tokens to max_length=40\n"
        )
        assert error.match(problem)
    data = load_conversations(path, Codec(chatml), split="train", max_length=40, skip_invalid_rows=True)
    assert [sequence.row for sequence in data.examples] == [3] and data.cut == 0


def test_a_text_of_one_token_teaches_nothing(tokenizer, write_jsonl):
    silent = copy.deepcopy(tokenizer)
    silent.eos_token = None
    with pytest.raises(UsageError, match=r"row 1, field 'text': no token is left to learn\n"):
        load_conversations(write_jsonl([{"text": "the"}]), Codec(silent), split="train", max_length=40)


def test_a_row_that_is_no_conversation(tokenizer, write_jsonl):
    path = write_jsonl([{"prompt": "a", "completion": " b"}, {"prompt": "a"}, {"chosen": "a"}])
    with pytest.raises(UsageError) as error:
        load_conversations(path, Codec(tokenizer), split="train", max_length=40)
    assert error.match(r"row 2, field 'completion': missing, with no 'chosen' either; the row has: prompt")
    assert error.match(r"row 3, field 'prompt': missing; the row has: chosen")


def test_a_template_without_marks_learns_what_one_with_them_does(tokenizer, chatml):
    options = {"split": "train", "max_length": 200}
    assert (
        load_conversations(str(DATA / "conversations.jsonl"), Codec(tokenizer), **options).examples
        == load_conversations(str(DATA / "conversations.jsonl"), Codec(chatml), **options).examples
    )


def test_a_batch_of_conversations():
    sequences = [TokenSequence(1, [11, 12, 13], [True, False, True]), TokenSequence(2, [21, 22], [True, True])]
    batch = collate_sequences(sequences, pad_id=7)
    x = IGNORED
    assert batch.input_ids.tolist() == [[11, 12, 13], [21, 22, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[x, x, 13], [x, 22, x]]
    assert batch.position_ids is None


# --- prompts


def test_prompts_from_every_kind_of_row(chatml):
    data = load_prompts(str(DATA / "prompts.jsonl"), Codec(chatml), split="train", max_prompt_length=100)
    assert [(p.row, p.prompt, p.answer) for p in data.examples] == [
        (1, "the cat", None),
        (2, user("the dogs?"), assistant("ran")),
        (3, [*user("a"), *assistant("b"), *user("c")], None),
        (4, user("a"), assistant("b")),
        (5, "dogs", " ran"),
    ]
    assert all(p.ids == encode_prompt(Codec(chatml), p.prompt) and p.length == len(p.ids) for p in data.examples)
    assert data.report("f") == "f: 5 prompts"


def test_the_first_prompts_only(chatml):
    data = load_prompts(
        str(DATA / "prompts.jsonl"), Codec(chatml), split="train", max_prompt_length=100, max_examples=2
    )
    assert [prompt.row for prompt in data.examples] == [1, 2]


def test_reviews_begin_with_two_to_eight_tokens(tokenizer, write_jsonl):
    texts = [f"{'the cat sat on a mat and ' * 3}{n}" for n in range(200)]
    source = write_jsonl([{"text": text, "label": 1} for text in texts])
    data = load_prompts(source, Codec(tokenizer), split="train", max_prompt_length=8)
    lengths = [prompt.length for prompt in data.examples]
    assert set(lengths) == set(range(2, 9))
    for text, prompt in zip(texts, data.examples, strict=True):
        assert prompt.ids == tokenizer(text).input_ids[: prompt.length]
        assert prompt.prompt + prompt.answer == text
    backwards = write_jsonl([{"text": text, "label": 1} for text in texts[::-1]], "backwards.jsonl")
    again = load_prompts(backwards, Codec(tokenizer), split="train", max_prompt_length=8).examples
    assert [prompt.length for prompt in again] == lengths[::-1]  # by the text, not by its place


def test_a_review_too_short_or_of_many_bytes(tokenizer, write_jsonl):
    with pytest.raises(UsageError, match=r"row 1, field 'text': has 1 tokens, expected at least 2"):
        load_prompts(write_jsonl([{"text": "the"}]), Codec(tokenizer), split="train", max_prompt_length=8)
    source = write_jsonl([{"text": "猫が座った"}])  # many tokens a letter, which is not cut in two
    (prompt,) = load_prompts(source, Codec(tokenizer), split="train", max_prompt_length=30).examples
    assert prompt.prompt and "猫が座った".startswith(prompt.prompt)
    assert tokenizer.decode(prompt.ids) == prompt.prompt


def test_bad_prompts(chatml, write_jsonl):
    rows = [
        {"prompt": "the"}, {"prompt": "the cat " * 9}, {"messages": [{"role": "user"}]}, {"completion": "a"},
        {"messages": []}, {"prompt": [*user("a"), *assistant("b")]}, {"messages": "a"},
    ]  # fmt: skip
    with pytest.raises(UsageError, match="6 of 7 rows") as error:
        load_prompts(write_jsonl(rows), Codec(chatml), split="train", max_prompt_length=12)
    for problem in (
        r"row 2, field 'prompt': has \d+ tokens, over max_prompt_length=12",
        r"row 3, field 'messages\[0\].content': expected text, got nothing",
        r"row 4, field 'prompt': missing, with no 'messages' or 'text' either; the row has: completion",
        r"row 5, field 'messages': expected a list that is not empty, got a list",
        r"row 6, field 'prompt': .*must end with a message of the user",
    ):
        assert error.match(problem)
