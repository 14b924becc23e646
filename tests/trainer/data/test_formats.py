"""Rows of known data sets, in small files made by hand, to plain columns; and what each format does not take."""

from pathlib import Path

import pytest

from rlhf_trainer.data.formats import format_of, plain_row
from rlhf_trainer.data.rows import read_rows
from rlhf_trainer.errors import RowError

DATA = Path(__file__).parent / "files"


def rows_of(name):
    return [row for _, row in read_rows(str(DATA / name), "train")]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
TLDR = {
    "info": {"subreddit": "s", "title": "t", "post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0,
}  # fmt: skip
ULTRAFEEDBACK = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}


# --- what becomes of good rows


@pytest.mark.parametrize("format", ["auto", "hh"])
def test_hh_transcripts_become_messages(format):
    first, second = (plain_row(row, format) for row in rows_of("hh.jsonl"))
    assert first == {
        "prompt": [user("Where do cats sleep?")],
        "chosen": [assistant("On a mat.")],
        "rejected": [assistant("I do not know.")],
    }
    assert second["prompt"] == [user("Name a fish."), assistant("The trout."), user("And one\n\nof the sea?")]
    assert (second["chosen"], second["rejected"]) == ([assistant("The cod.")], [assistant("The trout again.")])


@pytest.mark.parametrize("format", ["auto", "hh"])
def test_hh_transcripts_stay_text_for_a_model_that_does_not_chat(format):
    raw = rows_of("hh.jsonl")
    plain = [plain_row(row, format, chat=False) for row in raw]
    assert [row["prompt"] + row["chosen"] for row in plain] == [row["chosen"] for row in raw]
    assert [row["prompt"] + row["rejected"] for row in plain] == [row["rejected"] for row in raw]
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in plain)
    assert [row["chosen"] for row in plain] == [" On a mat.", " The cod."]


@pytest.mark.parametrize("format", ["auto", "tldr"])
def test_tldr_comparisons(format):
    first, second = (plain_row(row, format) for row in rows_of("tldr.jsonl"))
    assert first["prompt"] == (
        "SUBREDDIT: r/hats\n\nTITLE: Is a flat hat still a hat?\n\n"
        "POST: My cat sat on my hat. It is flat now.\n\nTL;DR:"
    )
    assert (first["chosen"], first["rejected"]) == (" My hat is flat.", " A cat.")
    assert (second["chosen"], second["rejected"]) == (" Dogs ran far.", " Hills.")  # choice 1


@pytest.mark.parametrize("format", ["auto", "imdb"])
def test_imdb_reviews_are_text_without_their_sentiment(format):
    raw = rows_of("imdb.jsonl")
    assert [plain_row(row, format) for row in raw] == [{"text": row["text"]} for row in raw]


@pytest.mark.parametrize("format", ["auto", "ultrafeedback"])
def test_ultrafeedback_conversations_share_their_prompt(format):
    first, second = (plain_row(row, format) for row in rows_of("ultrafeedback.jsonl"))
    assert first["prompt"] == [user("Name a colour.")]
    assert (first["chosen"], first["rejected"]) == ([assistant("Green.")], [assistant("No.")])
    assert "margin" not in first | second, "differences of scores are none"
    assert first["messages"] == [user("Name a colour."), assistant("Green.")]  # what fine-tuning takes


def test_an_implicit_prompt_may_be_long_and_responses_may_be_the_same():
    prompt = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = {"chosen": [*prompt, assistant("d")], "rejected": [*prompt, assistant("e")]}
    assert plain_row(row)["prompt"] == prompt and "margin" not in plain_row(row)
    same = plain_row({"chosen": row["chosen"], "rejected": row["chosen"]})
    assert same["prompt"] == prompt and same["chosen"] == same["rejected"] == [assistant("d")]


@pytest.mark.parametrize("name", ["conversations.jsonl", "labelled.jsonl", "prompts.jsonl"])
def test_plain_rows_stay_as_they_are(name):
    for row in rows_of(name):
        assert plain_row(row) == row
        assert plain_row(row, "plain") == row


def test_nulls_are_as_if_missing():
    """Parquet gives every row every column."""
    row = {"prompt": None, "messages": None, "label": None, "completion": None}
    assert plain_row(row | HH) == plain_row(HH)
    assert plain_row(row | {"text": "a"}) == {"text": "a"}
    assert plain_row(row | {"prompt": "a", "margin": None}) == {"prompt": "a"}


# --- which format a row speaks for


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (HH, "hh"),
        (HH | {"prompt": "a"}, "plain"),
        ({"chosen": "a", "rejected": "b"}, "plain"),
        (TLDR, "tldr"),
        (ULTRAFEEDBACK, "ultrafeedback"),
        (ULTRAFEEDBACK | {"prompt": "a"}, "ultrafeedback"),
        (ULTRAFEEDBACK | {"prompt": [user("a")]}, "plain"),
        ({"text": "a", "label": 1}, "imdb"),
        ({"text": "a", "prompt": "b"}, "plain"),
        ({"text": "a", "messages": [user("b")]}, "plain"),
        ({"prompt": "a", "completion": "b", "label": True}, "plain"),
        ({}, "plain"),
    ],
)
def test_auto_goes_by_columns_and_contents(row, format):
    assert format_of(row) == format


# --- GSM8K

WORD_PROBLEM = {"question": "2 cats have how many ears? ", "answer": "Each has 2.\n2 * 2 = <<2*2=4>>4\n#### 4"}


def test_a_word_problem_is_a_prompt_with_its_solution_and_its_result():
    row = WORD_PROBLEM | {"id": 7}
    assert format_of(row) == "gsm8k"
    assert plain_row(row, chat=True) == row | {
        "prompt": [user("2 cats have how many ears?")], "completion": [assistant(WORD_PROBLEM["answer"])],
        "ground_truth": "4",
    }  # fmt: skip
    assert plain_row(row, chat=False) == row | {
        "prompt": "Question: 2 cats have how many ears?\nAnswer:", "completion": " " + WORD_PROBLEM["answer"],
        "ground_truth": "4",
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{"answer": "4"}, {"answer": 4}, {"prompt": "p"}, {"messages": [user("q")]}])
def test_a_question_with_another_answer_is_no_word_problem(changes):
    assert format_of(WORD_PROBLEM | changes) == "plain"


# --- what is refused: (format, row, field, problem)

REFUSED = {
    "no mapping": ("auto", ["a"], "row", r"expected a mapping, got \['a'\]"),
    "hh without rejected": ("hh", {"chosen": HH["chosen"]}, "rejected", "missing; the row has: chosen"),
    "hh of messages": ("hh", ULTRAFEEDBACK, "chosen", "expected text, got a list"),
    "hh of plain text": ("hh", {"chosen": "a", "rejected": "b"}, "chosen", r"expected a transcript that begins with"),
    "hh with the human's last word": (
        "auto", HH | {"rejected": HH["rejected"] + "\n\nHuman: d"}, "rejected", "ends with the human's turn",
    ),
    "hh without common prompt": (
        "auto", HH | {"rejected": "\n\nHuman: x\n\nAssistant: c"}, "rejected", "differs from 'chosen' before the last",
    ),
    "hh of other lengths": (
        "auto", HH | {"rejected": HH["rejected"] + "\n\nHuman: d\n\nAssistant: e"}, "rejected",
        "differs from 'chosen' before the last",
    ),
    "tldr without choice": ("tldr", {**TLDR, "choice": None}, "choice", "missing; the row has: info, summaries"),
    "tldr with a third choice": ("auto", TLDR | {"choice": 2}, "choice", "expected 0 or 1, one of 2 summaries, got 2"),
    "tldr of one summary": ("auto", TLDR | {"summaries": [{"text": "a"}]}, "choice", "one of 2 summaries, got 0 of 1"),
    "tldr of an article": (
        "auto", TLDR | {"info": {"subreddit": None, "title": "t", "post": None}}, r"info.subreddit",
        "expected text, got nothing",
    ),
    "tldr with text for info": ("auto", TLDR | {"info": "a"}, "info", "expected a mapping, got text"),
    "tldr with text summaries": (
        "auto", TLDR | {"summaries": ["a", "b"]}, r"summaries\[0\]", "expected a mapping, got text",
    ),
    "imdb without text": ("imdb", {"review": "a"}, "text", "missing; the row has: review"),
    "imdb of numbers": ("auto", {"text": 5}, "text", "expected text, got int 5"),
    "ultrafeedback of text": ("ultrafeedback", HH, "chosen", "expected a list that is not empty, got text"),
    "ultrafeedback without prompt": (
        "auto", {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "chosen",
        "expected a conversation that begins with the prompt, as 'rejected' does",
    ),
    "ultrafeedback of two prompts": (
        "auto", ULTRAFEEDBACK | {"rejected": [user("x"), assistant("c")]}, "chosen", "that begins with the prompt",
    ),
    "gsm8k without result": ("gsm8k", WORD_PROBLEM | {"answer": "4"}, "answer", "with its result behind ####, got '4'"),
    "gsm8k with an empty result": ("auto", WORD_PROBLEM | {"answer": "4 ####"}, "answer", "its result behind ####"),
    "ultrafeedback of no messages": ("auto", ULTRAFEEDBACK | {"chosen": ["b"]}, r"chosen\[0\]", "got text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_a_format_does_not_take(case):
    format, row, field, problem = REFUSED[case]
    with pytest.raises(RowError, match=f"^field '{field}': .*{problem}"):
        plain_row(row, format)
