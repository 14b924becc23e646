"""`rlhf inspect`: what a person and a program see of the rows, and where it refuses."""

import json

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.data.views import as_text
from tests.trainer.messages import assistant, user

CHAT = {"messages": [*user("the cat"), *assistant("the mat")]}
PAIR = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}


@pytest.fixture
def inspect(model_folder, write_jsonl, capsys):
    """(command, rows, flags) -> exit status, standard output, standard error."""

    def run(command, rows, *flags):
        data = write_jsonl(rows)
        status = main(
            ["inspect", command, "--model_name_or_path", model_folder("llama"), "--dataset_name", data, *flags]
        )
        return status, *capsys.readouterr()

    return run


def test_a_conversation_for_a_person(inspect):
    status, out, err = inspect("sft", [CHAT, CHAT, CHAT], "--rows", "2")
    first, tokens, second, again = out.splitlines()
    assert status == 0 and err.endswith("train.jsonl: 3 conversations\n")
    assert (first, second) == (
        "row 1, conversation: 22 tokens, 3 learned",
        "row 2, conversation: 22 tokens, 3 learned",
    )
    header = "<|im_start|>|a|s|s|is|t|an|t|\\n"
    expected = f"  <|im_start|>|u|s|er|\\n|the| cat|<|im_end|>|\\n|{header}|[the]|[ mat]|[<|im_end|>]|\\n"
    assert tokens == again == expected


def test_all_rows_for_a_program(inspect, tokenizer):
    status, out, _ = inspect("sft", [CHAT] * 7, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["row"] for row in rows] == list(range(1, 8))
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    assert ids == tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    assert [i for i, label in zip(ids, labels, strict=True) if label == i] == tokenizer("the mat<|im_end|>").input_ids
    assert {label for i, label in zip(ids, labels, strict=True) if label != i} == {-100}


@pytest.mark.parametrize(("command", "learned"), [("dpo", "all"), ("reward", "last")])
def test_pairs_for_a_program(command, learned, inspect, tokenizer):
    _, out, _ = inspect(command, [PAIR], "--json")
    row = json.loads(out)
    assert (row["row"], row["prompt_ids"]) == (1, tokenizer("the cat").input_ids)
    for response, text in zip(row["responses"], (" sat", " ran"), strict=True):
        ids = tokenizer(f"{text}<|im_end|>").input_ids
        assert response["input_ids"] == ids
        assert response["labels"] == (ids if learned == "all" else [-100, ids[-1]])


def test_pairs_for_a_person(inspect):
    _, out, _ = inspect("dpo", [PAIR])
    assert out.splitlines() == [
        "row 1, prompt: 2 tokens", "  the| cat",
        "row 1, chosen: 2 tokens, 2 learned", "  [ sat]|[<|im_end|>]",
        "row 1, rejected: 2 tokens, 2 learned", "  [ ran]|[<|im_end|>]",
    ]  # fmt: skip


def test_prompts_of_each_command(inspect, tokenizer):
    for command, flags in (("ppo", ["--reward_funcs", "regex:a"]), ("grpo", ["--reward_funcs", "regex:a"])):
        _, out, _ = inspect(command, [{"prompt": user("the cat")}], *flags, "--json")
        ids = tokenizer.apply_chat_template(user("the cat"), add_generation_prompt=True)["input_ids"]
        assert json.loads(out) == {"row": 1, "prompt_ids": ids}


def test_prompts_to_sample(model_folder, write_jsonl, tokenizer, capsys):
    flags = ["--models", model_folder("llama"), "--dataset_name", write_jsonl([{"prompt": "the"}]), "--json"]
    assert main(["inspect", "sample", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == {"row": 1, "prompt_ids": tokenizer("the").input_ids}


def test_colours_and_long_pieces(tokenizer, write_jsonl):
    row = {"prompt": "the cat" * 20, "responses": [" sat", " ran", " ate"], "scores": [3, 2, 1]}
    lengths = {"max_prompt_length": 99, "max_length": 199}
    (group,) = load_groups(write_jsonl([row]), Codec(tokenizer), split="train", **lengths).examples
    lines = as_text(group, tokenizer, colour=True, ends=2).splitlines()
    assert lines[1] == f"  the| cat| ... {len(group.prompt) - 4} more ... |the| cat"
    assert lines[3] == "  \x1b[32m sat\x1b[0m|\x1b[32m<|im_end|>\x1b[0m"
    assert lines[-1] == "  pairs: 0 before 1, 0 before 2, 1 before 2"


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"prompt": "a"}], [], r"row 1, field 'completion': missing, with no 'chosen' either"),
        ([{"messages": user("a")}], [], "no message is the assistant's: there is nothing to learn"),
        ([CHAT], ["--max_lenth", "5"], "unknown flag --max_lenth; did you mean '--max_length'"),
        ([{"text": "the cat " * 60}], ["--max_length", "200"], "but the model has 96 positions; set max_length"),
    ],
)
def test_it_refuses_what_training_would(rows, flags, message, inspect):
    status, out, err = inspect("sft", rows, *flags)
    assert status == 1 and message in err and "Traceback" not in err and not out


def test_an_unknown_command(capsys):
    assert main(["inspect", "sfd"]) == 1
    assert (
        "expected one of sft, reward, sample, dpo, ppo, grpo; got 'sfd'; did you mean 'sft'?" in capsys.readouterr().err
    )


def test_a_run_begins_with_two_rows(train, model_folder, rows, write_jsonl, capsys):
    data = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(8)), "max_steps": 3}
    train(**data)
    out = capsys.readouterr().out
    assert "the first 2 rows as they are trained, what is learned in [brackets]:\nrow 1, prompt: " in out
    assert "row 2, rejected: " in out and "row 3" not in out
    train(**data, inspect_rows=0)
    assert "rows as they are trained" not in capsys.readouterr().out
