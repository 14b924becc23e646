"""`rlhf pairs`: which pairs are made of scored completions, by worked examples, and what the command leaves."""

import json

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_groups
from rlhf_trainer.errors import UsageError
from rlhf_trainer.preferences.config import PairsConfig
from rlhf_trainer.preferences.pairs import make_pairs, pair_up, pairs_among
from rlhf_trainer.rewards.config import RejectionConfig
from rlhf_trainer.rewards.rejection import rejection
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder


@pytest.mark.parametrize(
    ("rewards", "best_worst", "all_pairs"),
    [
        ([0.2, 0.9, 0.1, 0.5], [(1, 2)], [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        ([-3.0, -1.0, -2.0, -1.0], [(1, 0)], [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]),  # best twice: the earlier
        ([1.0, 0.0, 0.0], [(0, 2)], [(0, 1), (0, 2)]),  # worst twice: the later
        ([0.5, 0.5, 0.5], [], []),
        ([0.5], [], []),
        ([], [], []),
    ],
)
def test_pairs_among_rewards(rewards, best_worst, all_pairs):
    assert pairs_among(rewards, "best_worst") == best_worst
    assert pairs_among(rewards, "all") == all_pairs


def line(prompt, completion, reward, left_out=None):
    return {"prompt": prompt, "completion": completion, "reward": reward, "left_out": left_out}


NOTHING = {"equal rewards": 0, "fewer than two usable completions": 0}


def test_a_row_of_each_prompt_with_each_response_once():
    scored = [line("p", "b", 0.5), line("q", "d", 1.0), line("p", "a", 0.9), line("p", "b", 0.5), line("p", "c", 0.1),
              line("q", "e", 2.0)]  # fmt: skip
    p = {"prompt": "p", "responses": ["b", "a", "c"], "scores": [0.5, 0.9, 0.1]}
    q = {"prompt": "q", "responses": ["d", "e"], "scores": [1.0, 2.0], "pairs": [(1, 0)]}
    assert pair_up(scored, "best_worst") == ([p | {"pairs": [(1, 2)]}, q], NOTHING)
    assert pair_up(scored, "all") == ([p | {"pairs": [(1, 0), (1, 2), (0, 2)]}, q], NOTHING)


def test_what_was_left_out_is_in_no_pair():
    scored = [line("p", "a", None, "unfinished"), line("p", "b", 0.1), line("p", "", None, "empty"),
              line("p", "d", None, "too long"), line("p", "e", 0.2)]  # fmt: skip
    (row,), _ = pair_up(scored, "all")
    assert (row["responses"], row["pairs"]) == (["b", "e"], [(1, 0)])


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_prompts_that_give_no_pair_are_counted_by_reason(pairing):
    equal = [line("ties", "a", 0.5), line("ties", "b", 0.5), line("the same", "a", 0.5), line("the same", "a", 0.5)]
    too_few = [line("one", "a", 0.5), line("one", "b", None, "unfinished"), line("none", "", None, "empty")]
    assert pair_up(equal + too_few, pairing) == ([], {"equal rewards": 2, "fewer than two usable completions": 2})
    rows, without = pair_up([*equal, line("good", "a", 1.0), *too_few, line("good", "b", 0.0)], pairing)
    assert [row["prompt"] for row in rows] == ["good"] and sum(without.values()) == 4
    assert pair_up([], pairing) == ([], NOTHING)


def test_equal_messages_are_one_prompt_and_one_response():
    prompt, again = [{"role": "user", "content": "p"}], [{"content": "p", "role": "user"}]
    a, b = ([{"role": "assistant", "content": text}] for text in "ab")
    scored = [line(prompt, a, 1.0), line(again, [{"content": "a", "role": "assistant"}], 1.0), line(again, b, 0.0)]
    row = {"prompt": prompt, "responses": [a, b], "scores": [1.0, 0.0], "pairs": [(0, 1)]}
    assert pair_up(scored, "best_worst") == ([row], NOTHING)


# --- the command


@pytest.fixture
def run(tmp_path):
    def run(*scored, output="out", **options):
        return make_pairs(PairsConfig(scored=list(scored), output_dir=str(tmp_path / output), **options))

    return run


SCORED = [
    line("the", " cat", 1.0), line("the", " dogs", 0.0), line("the", " fish", 0.5),
    line("on", " a", None, "unfinished"), line("me", " a", 1.0), line("me", " b", 1.0),
]  # fmt: skip


def test_the_pairs_are_ready_for_dpo(run, write_jsonl, tokenizer, capsys):
    folder = run(write_jsonl(SCORED), pairing="all")
    out = capsys.readouterr().out
    assert "3 pairs of 3 prompts (without a pair: 1 equal rewards, 1 fewer than two usable completions)" in out
    loaded = load_groups(
        str(folder / "pairs.jsonl"), Codec(tokenizer), split="train", max_prompt_length=9, max_length=20
    )
    (group,) = loaded.examples
    responses = [tokenizer.decode(ids[:-1]) for ids in group.responses]
    assert [(responses[better], responses[worse]) for better, worse in group.pairs] == [
        (" cat", " fish"),
        (" cat", " dogs"),
        (" fish", " dogs"),
    ]
    assert json.loads((folder / "report.json").read_text()) == {
        "completions": 6, "prompts": 3, "pairs": 3,
        "prompts_without_pair": {"equal rewards": 1, "fewer than two usable completions": 1},
    }  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["pairs.jsonl", "report.json", CONFIG_FILE]


def test_one_prompt_of_several_folders_is_one_prompt(run, write_jsonl, tmp_path):
    """Completions of several models, each scored in a run of its own."""
    for name, completion in (("a", " 4"), ("b", " 5")):
        data = write_jsonl([{"prompt": "2+2", "completion": completion, "columns": {"answer": "4"}}], f"{name}.jsonl")
        rejection(RejectionConfig(completions=[data], reward_funcs=["exact_answer"], output_dir=str(tmp_path / name)))
    folder = run(str(tmp_path / "b"), str(tmp_path / "a" / "scored.jsonl"))
    (row,) = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
    assert row == {"prompt": "2+2", "responses": [" 5", " 4"], "scores": [0.0, 1.0], "pairs": [[1, 0]]}


def test_a_finished_run_stays_as_it_is(run, write_jsonl, capsys):
    data = write_jsonl(SCORED)
    folder = run(data)
    before = (folder / "pairs.jsonl").stat().st_mtime_ns
    assert run(data, resume_from_checkpoint=True) == folder and (folder / "pairs.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="exists; choose another one, or pass --overwrite_output_dir"):
        run(data)
    with pytest.raises(UsageError, match="pairing: 'best_worst' then, 'all' now"):
        run(data, resume_from_checkpoint=True, pairing="all")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "row 7, field 'row': not JSON"),
        ("3", "row 7, field 'row': expected a mapping, got int 3"),
        ({"prompt": "a", "reward": 1}, "row 7, field 'completion': missing; the row has: prompt, reward"),
        ({"prompt": "a", "completion": " b"}, "row 7, field 'reward': missing"),
        (line(3, " b", 1.0), "row 7, field 'prompt': expected text or a list of messages, got int 3"),
        (line("a", " b", "1"), "row 7, field 'reward': expected a finite number, got text"),
        (line("a", " b", float("nan")), "row 7, field 'reward': expected a finite number, got float nan"),
    ],
)
def test_rows_that_are_not_scored_completions(run, write_jsonl, bad, message):
    with pytest.raises(UsageError, match=f"train.jsonl: 1 rows are not scored completions:\n  {message}"):
        run(write_jsonl([*SCORED, bad]))


def test_bad_sources(run, write_jsonl, tmp_path, capsys):
    data = write_jsonl(SCORED)
    with pytest.raises(UsageError, match="scored: name at least one file"):
        run()
    with pytest.raises(UsageError, match=r"scored: duplicate .*train.jsonl; name each file once"):
        run(data, data)
    with pytest.raises(UsageError, match="is empty: expected rows with prompt, completion and reward"):
        run(write_jsonl([], "empty.jsonl"))
    with pytest.raises(UsageError, match=r"no prompt gives a pair, .* \(prompts: 1 equal rewards, 1 fewer than two"):
        run(write_jsonl(SCORED[3:], "none.jsonl"))
    assert main(["pairs", "--scored", "none_here.jsonl", "--output_dir", str(tmp_path / "out")]) == 2
    assert "rlhf pairs: none_here.jsonl: no such file" in capsys.readouterr().err
    assert not partial_folder(tmp_path / "out").exists()
