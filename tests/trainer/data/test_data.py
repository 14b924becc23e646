"""Rows in, token ids out: masking token by token, and every kind of bad row named by file, row and field."""

import copy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch

from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import Group, load_groups
from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.pair_batches import collate_groups
from tests.trainer.messages import assistant, user

DATA = Path(__file__).parent / "files"

GOOD = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}


def load(source, tokenizer, **options):
    return load_groups(
        source, Codec(tokenizer), **({"split": "train", "max_prompt_length": 20, "max_length": 40} | options)
    )  # fmt: skip


def chosen(group):
    """The better response of the only pair."""
    ((better, _),) = group.pairs
    return group.responses[better]


def rejected(group):
    ((_, worse),) = group.pairs
    return group.responses[worse]


# --- what becomes of a good row


def test_plain_text_token_by_token(tokenizer, write_jsonl):
    (group,) = load(write_jsonl([GOOD]), tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(group.prompt) == ["the", "Ġcat"]
    assert tokenizer.convert_ids_to_tokens(chosen(group)) == ["Ġsat", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(rejected(group)) == ["Ġran", "<|im_end|>"]
    assert group.row == 1 and group.margins == [0.0]


def test_chat_messages_token_by_token(tokenizer, write_jsonl):
    """Template applied, generation prompt on and part of the prompt; the response ends with the end of its turn."""
    row = {"prompt": user("the cat"), "chosen": assistant("sat on"), "rejected": assistant("ran")}
    (group,) = load(write_jsonl([row]), tokenizer).examples
    assert tokenizer.decode(group.prompt) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    special = tokenizer.convert_ids_to_tokens(group.prompt)
    assert [t for t in special if t.startswith("<|")] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.decode(chosen(group)) == "sat on<|im_end|>"  # without the line break the template puts behind it
    assert tokenizer.decode(rejected(group)) == "ran<|im_end|>"
    assert chosen(group)[-1] == tokenizer.eos_token_id


def test_chat_with_a_system_message_and_earlier_turns(tokenizer, write_jsonl):
    prompt = [{"role": "system", "content": "on"}, *user("cat"), *assistant("sat"), *user("dogs")]
    row = {"prompt": prompt, "chosen": assistant("ran"), "rejected": assistant("ate")}
    (group,) = load(write_jsonl([row]), tokenizer, max_prompt_length=100, max_length=200).examples
    text = tokenizer.decode(group.prompt)
    assert text.startswith("<|im_start|>system\non<|im_end|>\n") and text.endswith("<|im_start|>assistant\n")
    assert "sat<|im_end|>" in text  # an earlier answer is prompt
    assert tokenizer.decode(chosen(group)) == "ran<|im_end|>"


def test_a_template_that_writes_special_tokens_gets_no_second_ones(tokenizer, write_jsonl):
    with_bos = copy.deepcopy(tokenizer)
    with_bos.chat_template = "<s>" + tokenizer.chat_template
    with_bos.add_bos_token = True
    row = {"prompt": user("the cat"), "chosen": assistant("sat"), "rejected": assistant("ran")}
    (group,) = load(write_jsonl([row]), with_bos).examples
    assert with_bos.convert_ids_to_tokens(group.prompt).count("<s>") == 1


def test_batch_masks_prompt_and_padding(tokenizer, write_jsonl):
    rows = [
        {"prompt": "the", "chosen": " cat sat", "rejected": " ran"},
        {"prompt": "a mat", "chosen": " on", "rejected": " far"},
    ]
    pairs = collate_groups(load(write_jsonl(rows), tokenizer).examples, pad_id=7)
    batch = pairs.batch
    end = tokenizer.eos_token_id
    the, cat, sat, ran, a, mat, on, far = (
        tokenizer(w).input_ids[0] for w in ["the", " cat", " sat", " ran", "a", " mat", " on", " far"]
    )
    assert batch.input_ids.tolist() == [
        [the, cat, sat, end], [the, ran, end, 7],  # prompt by prompt
        [a, mat, on, end], [a, mat, far, end],
    ]  # fmt: skip
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [
        [-100, cat, sat, end], [-100, ran, end, -100],
        [-100, -100, on, end], [-100, -100, far, end],
    ]  # fmt: skip
    assert (pairs.chosen_idxs.tolist(), pairs.rejected_idxs.tolist()) == ([0, 2], [1, 3])
    assert all(tensor.dtype == torch.int64 for tensor in batch[:3])
    assert batch.position_ids is None


def test_long_responses_are_cut_and_counted(tokenizer, write_jsonl):
    data = load(write_jsonl([GOOD | {"chosen": " sat" * 50}, GOOD]), tokenizer, max_length=10)
    assert [len(group.prompt) + len(chosen(group)) for group in data.examples] == [10, 4]
    assert data.cut == 1
    assert "1 sequences cut at max_length" in data.report("d.jsonl")


def test_blank_lines_count_as_lines_but_not_as_rows(tokenizer, write_jsonl):
    assert [group.row for group in load(write_jsonl([GOOD, "", GOOD]), tokenizer).examples] == [1, 3]


def test_parquet_and_jsonl_give_the_same(tokenizer, write_jsonl, tmp_path):
    """Parquet gives every row every column, null where the row has none."""
    rows = [GOOD | {"margin": 1.5}, {"prompt": "dogs", "chosen": " ran far", "rejected": " ate", "source": "x"}]
    for number, same in enumerate(
        [rows, [{"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}]]
    ):
        pq.write_table(pa.Table.from_pylist(same), tmp_path / f"{number}.parquet")
        parquet = load(str(tmp_path / f"{number}.parquet"), tokenizer).examples
        assert parquet == load(write_jsonl(same), tokenizer).examples


# --- pairs from other columns


def decoded(tokenizer, groups):
    """(row, prompt, better response, worse response, margin) of every pair, in order."""
    return [
        (group.row, *map(tokenizer.decode, (group.prompt, group.responses[better], group.responses[worse])), margin)
        for group in groups
        for (better, worse), margin in zip(group.pairs, group.margins, strict=True)
    ]


def test_pairs_from_every_kind_of_row(chatml):
    end = "<|im_end|>"
    cat, dogs = (f"<|im_start|>user\nthe {who}?<|im_end|>\n<|im_start|>assistant\n" for who in ("cat", "dogs"))
    data = load(str(DATA / "pairs.jsonl"), chatml, max_prompt_length=60, max_length=90)
    assert decoded(chatml, data.examples) == [
        (1, "the cat", f" sat on the mat{end}", f" ran{end}", 2.0),
        (2, cat, f"on the mat{end}", f"far{end}", 0.0),
        (3, dogs, f"ran{end}", f"ate{end}", 0.0),
        (4, "dogs", f" ran far{end}", f" ate{end}", 0.0),
        (4, "dogs", f" sat{end}", f" ate{end}", 0.0),
        (5, "fish", f" see me{end}", f" ate{end}", 0.0),  # a draw of 0.5 and 0.5 is no pair
        (5, "fish", f" sat{end}", f" ate{end}", 0.0),
    ]
    assert [len(group.responses) for group in data.examples] == [2, 2, 2, 3, 3], "each response once"
    assert data.report("f") == "f: 5 prompts with 7 pairs"


@pytest.mark.parametrize("name", ["hh", "tldr", "ultrafeedback"])
def test_known_data_sets_give_pairs(name, chatml):
    lengths = {"max_prompt_length": 200, "max_length": 300}
    groups = load(str(DATA / f"{name}.jsonl"), chatml, **lengths).examples
    assert [group.row for group in groups] == [1, 2]
    assert groups == load(str(DATA / f"{name}.jsonl"), chatml, format=name, **lengths).examples
    assert all(chosen(group)[-1] == rejected(group)[-1] == chatml.eos_token_id for group in groups)


def test_a_transcript_is_text_for_a_tokenizer_without_a_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    group = load(str(DATA / "hh.jsonl"), bare, max_prompt_length=200, max_length=300).examples[0]
    assert bare.decode(group.prompt) == "\n\nHuman: Where do cats sleep?\n\nAssistant:"
    assert bare.decode(chosen(group)) == " On a mat.<|im_end|>"


def test_a_response_in_many_pairs_is_cut_once(tokenizer, write_jsonl):
    row = {"prompt": "the", "responses": [" cat" * 20, " sat", " ran"], "scores": [3, 2, 1]}
    data = load(write_jsonl([row]), tokenizer, max_prompt_length=4, max_length=9)
    (group,) = data.examples
    lengths = [len(ids) for ids in group.responses]
    assert [(lengths[better], lengths[worse]) for better, worse in group.pairs] == [(8, 2), (8, 2), (2, 2)]
    assert group.margins == [0, 0, 0]
    assert data.cut == 1


def test_pairs_of_a_row_share_their_responses(tokenizer, write_jsonl):
    """Responses stand in the order in which the pairs name them."""
    the, far, ran, sat, end = (tokenizer(word).input_ids[0] for word in ["the", " far", " ran", " sat", "<|im_end|>"])
    row = {"prompt": "the", "responses": [" far", " ran", " sat"], "pairs": [[2, 1], [0, 1]]}
    groups = load(write_jsonl([row, {"prompt": "the", "chosen": " sat", "rejected": " ran", "margin": 0.5}]), tokenizer)
    assert groups.examples == [
        Group(1, [the], [[sat, end], [ran, end], [far, end]], [(0, 1), (2, 1)], [0.0, 0.0]),
        Group(2, [the], [[sat, end], [ran, end]], [(0, 1)], [0.5]),
    ]


def test_responses_of_the_same_tokens_are_one(tokenizer, write_jsonl):
    """Cutting may make them so, too; the pairs stay."""
    long = {"prompt": "the", "responses": [" cat" * 20 + " sat", " cat" * 20 + " ran", " far"]}
    rows = [GOOD | {"rejected": GOOD["chosen"]}, long | {"pairs": [[0, 2], [1, 2], [2, 0]]}]
    data = load(write_jsonl(rows), tokenizer, max_prompt_length=4, max_length=9)
    the, cat, sat, end = (tokenizer(word).input_ids[0] for word in ["the", " cat", " sat", "<|im_end|>"])
    far = tokenizer(" far").input_ids[0]
    assert data.examples == [
        Group(1, [the, cat], [[sat, end]], [(0, 0)], [0.0]),
        Group(2, [the], [[cat] * 8, [far, end]], [(0, 1), (0, 1), (1, 0)], [0.0] * 3),
    ]
    assert data.cut == 2
    assert data.examples[1].length == 9


def test_the_format_can_be_named(tokenizer, write_jsonl):
    with pytest.raises(UsageError, match=r"row 1, field 'chosen': expected a transcript"):
        load(write_jsonl([GOOD]), tokenizer, format="hh")


# --- what becomes of a bad one: (row, field, what the message says)

BAD_ROWS = {
    "missing column": ({"prompt": "a", "chosen": " b"}, "rejected", r"missing; the row has: prompt, chosen"),
    "null": (GOOD | {"chosen": None}, "chosen", r"missing; the row has: prompt, rejected"),
    "empty response": (GOOD | {"rejected": ""}, "rejected", r"the response is empty"),
    "blank response": (GOOD | {"chosen": " \n"}, "chosen", r"the response is empty"),
    "empty prompt": (GOOD | {"prompt": ""}, "prompt", r"has no tokens"),
    "long prompt": (GOOD | {"prompt": "cat" * 21}, "prompt", r"has \d+ tokens, over max_prompt_length=20"),
    "number for text": (GOOD | {"chosen": 5}, "chosen", r"expected text, as in 'prompt', got int 5"),
    "number for prompt": (GOOD | {"prompt": 5}, "prompt", r"expected text or a list of messages, got int"),
    "messages for text": (GOOD | {"chosen": assistant("b")}, "chosen", r"expected text, as in 'prompt', got a list"),
    "text for messages": (
        {"prompt": user("a"), "chosen": " b", "rejected": assistant("c")}, "chosen",
        r"expected a list of messages, as in 'prompt', got text",
    ),
    "no messages": ({"prompt": [], "chosen": [], "rejected": []}, "prompt", r"the list of messages is empty"),
    "message without content": (
        {"prompt": [{"role": "user"}], "chosen": assistant("b"), "rejected": assistant("c")}, r"prompt\[0\].content",
        r"expected text, got nothing",
    ),
    "message of text": (
        {"prompt": user("a"), "chosen": ["b"], "rejected": assistant("c")}, r"chosen\[0\]",
        r"expected \{'role': ..., 'content': ...\}, got text",
    ),
    "empty message": (
        {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("")}, "rejected", "the response is empty",
    ),
    "user has the last word": (
        {"prompt": user("a"), "chosen": user("b"), "rejected": assistant("c")}, "chosen",
        r"the last message must be the assistant's, got role 'user'",
    ),
    "three messages": (
        {"prompt": user("a"), "chosen": assistant("b"), "rejected": [*assistant("b"), *user("c"), *assistant("d")]},
        "rejected", "expected one message, what the assistant answers, got 3",
    ),
    "a word for a margin": (GOOD | {"margin": "big"}, "margin", "expected a finite number, got text"),
    "a margin below 0": (GOOD | {"margin": -1}, "margin", "expected by how much 'chosen' is better, got -1"),
    "half a character": (GOOD | {"chosen": "a \ud83d"}, "chosen", "is not text: 'utf-8' codec can't encode"),
    "no margin": (GOOD | {"margin": float("nan")}, "margin", "expected a finite number, got float nan"),
    "responses without judgement": (
        {"prompt": "a", "responses": [" b", " c"]}, "pairs", "missing, with no 'scores' either; the row has: ",
    ),
    "text for responses": ({"prompt": "a", "responses": " b", "scores": [1]}, "responses", "expected .* got text"),
    "too few scores": (
        {"prompt": "a", "responses": [" b", " c"], "scores": [1]}, "scores", "expected one for each of the 2 .* got 1",
    ),
    "a word for a score": (
        {"prompt": "a", "responses": [" b", " c"], "scores": [1, "x"]}, r"scores\[1\]", "expected a finite number",
    ),
    "equal scores": (
        {"prompt": "a", "responses": [" b", " c"], "scores": [1, 1]}, "scores", "all are equal: no response is better",
    ),
    "no pairs": ({"prompt": "a", "responses": [" b", " c"], "pairs": []}, "pairs", "expected a list that is not empty"),
    "a pair out of range": (
        {"prompt": "a", "responses": [" b", " c"], "pairs": [[0, 1], [0, 2]]}, r"pairs\[1\]",
        r"expected \[winner, loser\], two positions from 0 to 1, got \[0, 2\]",
    ),
    "a pair with itself": (
        {"prompt": "a", "responses": [" b", " c"], "pairs": [[1, 1]]}, r"pairs\[0\]", r"expected \[winner, loser\]",
    ),
    "an empty response among many": (
        {"prompt": "a", "responses": [" b", " "], "pairs": [[0, 1]]}, r"responses\[1\]", "the response is empty",
    ),
    "not a mapping": ([1, 2], "row", r"expected a mapping, got \[1, 2\]"),
    "not JSON": ('{"prompt": "a", "chosen"', "row", r"not JSON: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_by_file_row_and_field(kind, tokenizer, write_jsonl):
    row, field, problem = BAD_ROWS[kind]
    path = write_jsonl([GOOD, row, GOOD])
    with pytest.raises(UsageError, match=rf"train.jsonl: 1 of 3 rows .*\n  row 2, field '{field}': {problem}") as error:
        load(path, tokenizer)
    assert "--skip_invalid_rows" in str(error.value)
    data = load(path, tokenizer, skip_invalid_rows=True)
    assert [group.row for group in data.examples] == [1, 3]
    assert len(data.skipped) == 1
    assert "1 invalid rows skipped" in data.report(path) and "row 2" in data.report(path)


def test_a_response_without_tokens_is_all_masked(tokenizer, write_jsonl):
    """A tokenizer that drops what it does not know may leave nothing of a response that is not empty."""
    silent = copy.deepcopy(tokenizer)
    silent.eos_token = None
    silent.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("cat", "")
    path = write_jsonl([GOOD | {"prompt": "dogs"}, {"prompt": "dogs", "chosen": "cat", "rejected": " sat"}])
    with pytest.raises(UsageError, match=r"row 2, field 'chosen': all tokens are masked"):
        load(path, silent)


def test_messages_need_a_chat_template(tokenizer, write_jsonl):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    row = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    with pytest.raises(UsageError, match=r"row 1, field 'prompt': .*no chat template.*\nEvery row is unusable"):
        load(write_jsonl([row]), bare)


def test_what_a_template_refuses_is_passed_on(tokenizer, write_jsonl):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    with pytest.raises(UsageError, match=r"row 1, field 'prompt': the chat template refuses .*: roles must alternate"):
        load(write_jsonl([row]), strict)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer, write_jsonl):
    """The beginning of the response is unknown, so no mask would be right."""
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    row = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}
    with pytest.raises(
        UsageError,
        match=r"row 1, field .chosen.: the chat template renders the conversation before a turn of the assistant diff",
    ):
        load(write_jsonl([row]), odd)


def test_only_the_first_problems_are_listed(tokenizer, write_jsonl):
    path = write_jsonl([GOOD] + [GOOD | {"chosen": ""}] * 8)
    with pytest.raises(UsageError, match=r"8 of 9 rows.*(.|\n)*row 6, (.|\n)*and 3 more") as error:
        load(path, tokenizer)
    assert "row 7" not in str(error.value)


def test_nothing_left_after_skipping_is_an_error(tokenizer, write_jsonl):
    with pytest.raises(UsageError, match="Every row is unusable"):
        load(write_jsonl([GOOD | {"chosen": ""}]), tokenizer, skip_invalid_rows=True)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(content, tokenizer, tmp_path):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"e.jsonl is empty: expected rows that make prompts with pairs"):
        load(str(tmp_path / "e.jsonl"), tokenizer)
