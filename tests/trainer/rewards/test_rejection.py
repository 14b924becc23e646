"""Rejection sampling: which completions are selected, and the files they come from and go to."""

import copy
import json
import sys

import pytest

import rlhf_trainer.models.scoring
from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import load_conversations
from rlhf_trainer.errors import UsageError
from rlhf_trainer.rewards.config import RejectionConfig
from rlhf_trainer.rewards.rejection import Candidate, rejection, select
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder
from tests.trainer.known_models import save_word_reward_model

# Three prompts, four completions each; the fourth prompt has one only.
#            completion: 0     1     2     3
MATRIX = {0: [0.2, 0.9, 0.1, 0.5],
          1: [-3.0, -1.0, -2.0, -1.0],  # best twice
          2: [2.0, 1.5, 1.8, 0.0],
          3: [0.3]}  # fmt: skip
CANDIDATES = [Candidate(prompt, reward) for prompt, row in MATRIX.items() for reward in row]
ROW_STARTS = [0, 4, 8, 12]


def cells(positions):
    """Positions in the flat list -> (prompt, completion)."""
    return [(CANDIDATES[i].prompt, i - ROW_STARTS[CANDIDATES[i].prompt]) for i in positions]


def test_best_of_n_is_the_maximum_of_each_row():
    assert cells(select(CANDIDATES, "top_per_prompt", 1)) == [(0, 1), (1, 1), (2, 0), (3, 0)]


def test_top_two_per_prompt_are_best_first_and_equal_rewards_keep_their_order():
    assert cells(select(CANDIDATES, "top_per_prompt", 2)) == [(0, 1), (0, 3), (1, 1), (1, 3), (2, 0), (2, 2), (3, 0)]


def test_top_k_overall_takes_the_largest_of_the_matrix():
    """The selection is as large as best of N, but prompt 1 is gone: all its rewards are lower."""
    assert cells(select(CANDIDATES, "top_k_overall", 4)) == [(2, 0), (2, 2), (2, 1), (0, 1)]


def test_top_k_overall_with_a_limit_per_prompt():
    assert cells(select(CANDIDATES, "top_k_overall", 4, max_per_prompt=1)) == [(2, 0), (0, 1), (3, 0), (1, 1)]
    assert cells(select(CANDIDATES, "top_k_overall", 5, max_per_prompt=2)) == [(2, 0), (2, 2), (0, 1), (0, 3), (3, 0)]


def test_more_than_there_are_is_all_there_are():
    assert (
        sorted(select(CANDIDATES, "top_per_prompt", 9))
        == sorted(select(CANDIDATES, "top_k_overall", 99))
        == list(range(13))
    )
    assert select(CANDIDATES, "random", 9, seed=0) == list(range(13))


def test_prompts_need_not_be_adjacent():
    """Completions of another model follow after those of the first one."""
    mixed = [Candidate(0, 1.0), Candidate(1, 5.0), Candidate(0, 2.0), Candidate(1, 4.0)]
    assert select(mixed, "top_per_prompt", 1) == [2, 1]
    assert select(mixed, "top_k_overall", 2, max_per_prompt=1) == [1, 2]


def test_random_takes_as_many_of_each_prompt_and_does_not_look_at_rewards():
    for k in (1, 2, 3):
        best = [CANDIDATES[i].prompt for i in select(CANDIDATES, "top_per_prompt", k)]
        assert [CANDIDATES[i].prompt for i in select(CANDIDATES, "random", k, seed=5)] == best
    assert select(CANDIDATES, "random", 2, seed=5) == select(CANDIDATES, "random", 2, seed=5)
    drawn = [select(CANDIDATES, "random", 1, seed=seed) for seed in range(400)]
    for column in range(4):  # each of four completions in a quarter of the draws: 100, give or take 4 sigma = 35
        assert 65 < sum(positions[0] == column for positions in drawn) < 135
    flipped = [Candidate(candidate.prompt, -candidate.reward) for candidate in CANDIDATES]
    assert select(flipped, "random", 2, seed=5) == select(CANDIDATES, "random", 2, seed=5)


# --- the stage: the reward model rewards the share of " cat" among all tokens, the end included


@pytest.fixture(scope="module")
def word_reward_model(tokenizer, tmp_path_factory):
    return save_word_reward_model(tmp_path_factory.mktemp("reward_model"), copy.deepcopy(tokenizer), " cat")


@pytest.fixture
def run(word_reward_model, tmp_path):
    def run(*completions, output="out", **options):
        return rejection(
            RejectionConfig(
                completions=list(completions),
                reward_model_name_or_path=word_reward_model,
                output_dir=str(tmp_path / output),
                **options,
            )
        )

    return run


def row(prompt, completion, model="a", **more):
    return {"prompt": prompt, "completion": completion, "model": model} | more


ROWS = [
    row("the", " cat dogs dogs"),
    row("the", " cat cat dogs"),
    row("on", " fish fish"),
    row("on", " fish cat"),
    row("the", " cat cat cat", finished=False),  # the best, but it did not end
    row("on", "  "),
]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_of_each_prompt_is_ready_for_sft(run, write_jsonl, tokenizer, capsys):
    folder = run(write_jsonl(ROWS))
    selected = lines_of(folder / "selected.jsonl")
    assert [(line["prompt"], line["completion"]) for line in selected] == [
        ("the", " cat cat dogs"),
        ("on", " fish cat"),
    ]
    assert all(line.keys() == {"prompt", "completion", "reward", "model"} for line in selected)
    conversations = load_conversations(str(folder / "selected.jsonl"), Codec(tokenizer), split="train", max_length=64)
    assert len(conversations.examples) == 2

    scored = lines_of(folder / "scored.jsonl")
    assert [(line["prompt"], line["completion"]) for line in scored] == [(r["prompt"], r["completion"]) for r in ROWS]
    assert [line["left_out"] for line in scored] == [None, None, None, None, "unfinished", "empty"]
    assert [line["reward"] is None for line in scored] == [False, False, False, False, True, True]
    assert scored[1]["reward"] > scored[0]["reward"] > 0 and scored[3]["reward"] > scored[2]["reward"] == 0
    assert [line["reward"] for line in selected] == [scored[1]["reward"], scored[3]["reward"]]

    report = json.loads((folder / "report.json").read_text())
    assert (report["completions"], report["prompts"]) == (6, 2)
    assert report["left_out"] == {"unfinished": 1, "empty": 1, "too long": 0}
    rewards = [line["reward"] for line in scored[:4]]
    assert report["candidates"]["mean_reward"] == pytest.approx(sum(rewards) / 4)
    assert report["selected"]["mean_reward"] == pytest.approx((rewards[1] + rewards[3]) / 2)
    assert (report["selected"]["completions"], report["selected"]["prompts"]) == (2, 2)
    out = capsys.readouterr().out
    assert "6 completions of 2 prompts, left out: 1 unfinished, 1 empty, 0 too long" in out
    assert "candidates: 4 of 2 prompts, mean reward +" in out and "selected:   2 of 2 prompts, mean reward +" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.json", CONFIG_FILE, "scored.jsonl", "selected.jsonl",
    ]  # fmt: skip


def test_one_prompt_of_several_models_and_folders_is_one_prompt(run, write_jsonl, tmp_path):
    first = write_jsonl([row("the", " cat dogs", "a"), row("on", " dogs", "a")], "first.jsonl")
    (tmp_path / "second").mkdir()
    write_jsonl([row("on", " cat", "b"), row("the", " cat cat dogs", "b")], "second/completions.jsonl")
    folder = run(first, str(tmp_path / "second"))
    selected = [(line["prompt"], line["completion"], line["model"]) for line in lines_of(folder / "selected.jsonl")]
    assert selected == [("the", " cat cat dogs", "b"), ("on", " cat", "b")]
    report = json.loads((folder / "report.json").read_text())
    assert report["prompts"] == 2
    assert report["candidates"]["by_model"]["a"]["completions"] == 2
    assert report["selected"]["by_model"]["a"] == {"completions": 0, "prompts": 0, "mean_reward": None}
    assert report["selected"]["by_model"]["b"]["completions"] == 2


def test_equal_prompts_of_messages_are_one_prompt(run, write_jsonl):
    user, user_again = {"role": "user", "content": "the"}, {"content": "the", "role": "user"}
    completions = [[{"role": "assistant", "content": text}] for text in ("fish fish", "fish cat", " ")]
    folder = run(
        write_jsonl([row([user], completions[0]), row([user_again], completions[1]), row([user], completions[2])])
    )
    (selected,) = lines_of(folder / "selected.jsonl")
    assert selected["completion"] == completions[1] and selected["prompt"] == [user]
    assert [line["left_out"] for line in lines_of(folder / "scored.jsonl")] == [None, None, "empty"]


def test_the_other_selections(run, write_jsonl):
    data = write_jsonl(ROWS)

    def selected(output, **options):
        return [line["completion"] for line in lines_of(run(data, output=output, **options) / "selected.jsonl")]

    assert selected("overall", selection="top_k_overall", k=2) == [" cat cat dogs", " cat dogs dogs"]  # of one prompt
    assert selected("overall3", selection="top_k_overall", k=3, max_per_prompt=1) == [" cat cat dogs", " fish cat"]
    by_seed = [selected(f"random{seed}", selection="random", seed=seed) for seed in range(6)]
    assert len({tuple(drawn) for drawn in by_seed}) > 1 and all(len(drawn) == 2 for drawn in by_seed)


def test_what_is_too_long_is_left_out(run, write_jsonl):
    folder = run(write_jsonl([row("the", " cat" * 9), row("the", " fish")]), max_length=8)
    assert [line["left_out"] for line in lines_of(folder / "scored.jsonl")] == ["too long", None]
    with pytest.raises(UsageError, match=r"none of 2 can be selected \(0 unfinished, 0 empty, 2 too long\)"):
        run(write_jsonl([row("the", " cat" * 9)] * 2), output="none", max_length=8)


def test_a_run_goes_on_with_the_batches_it_has(run, write_jsonl, tmp_path, monkeypatch):
    data = write_jsonl(ROWS)
    whole = run(data, output="whole", per_device_eval_batch_size=1)
    scoring, last_values, calls = rlhf_trainer.models.scoring, rlhf_trainer.models.scoring.last_values, []

    def break_off_at(call):
        def values(*args):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return last_values(*args)

        calls.clear()
        monkeypatch.setattr(scoring, "last_values", values)

    break_off_at(5)  # the check of the head at loading and at scoring, two batches, and in the third
    with pytest.raises(KeyboardInterrupt):
        run(data, per_device_eval_batch_size=1)
    break_off_at(0)
    folder = run(data, per_device_eval_batch_size=1, resume_from_checkpoint=True)
    assert len(calls) == 2 + 2
    for name in ("scored.jsonl", "selected.jsonl", "report.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "row 2, field 'row': not JSON"),
        ("[1]", "row 2, field 'row': expected a mapping, got a list"),
        ({"prompt": "a"}, "row 2, field 'completion': missing; the row has: prompt"),
        ({"completion": "a"}, "row 2, field 'prompt': missing; the row has: completion"),
        (row("a", ["b"]), "row 2, field 'completion': expected text"),
        (row("a", " b", model=3), "row 2, field 'model': expected text, got int 3"),
        (row("a", " b", finished="yes"), "row 2, field 'finished': expected true or false, got text"),
    ],
)
def test_rows_that_are_no_completions(run, write_jsonl, line, message):
    with pytest.raises(UsageError, match=message):
        run(write_jsonl([ROWS[0], line]))


def test_bad_sources(run, write_jsonl, tmp_path):
    data = write_jsonl(ROWS)
    with pytest.raises(UsageError, match="no such file"):
        run(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match=r"completions: duplicate .*train.jsonl; name each file once"):
        run(data, data)
    with pytest.raises(UsageError, match="is empty: expected rows with prompt and completion"):
        run(write_jsonl([], "empty.jsonl"))
    with pytest.raises(UsageError, match="max_per_prompt is for selection top_k_overall"):
        run(data, max_per_prompt=1)
    with pytest.raises(
        UsageError, match=r"long.jsonl, row 1: \d+ tokens, but the model has 96 positions; set max_length"
    ):
        run(write_jsonl([row("the", " cat" * 99)], "long.jsonl"))
    assert not partial_folder(tmp_path / "out").exists()


# --- other rewards, and several


MATHS = [
    row("2 + 2", " It is 4.", columns={"ground_truth": "4", "level": 1}),
    row("2 + 2", " It is 5.", columns={"ground_truth": "4", "level": 1}),
    row("2 + 3", " 5 cat", columns={"ground_truth": "5"}),
    row("2 + 3", " #### 5", columns={"ground_truth": "5"}),
    row("2 + 5", " 6", columns={"ground_truth": "7"}),
    row("2 + 5", " 7", finished=False, columns={"ground_truth": "7"}),
]
LENGTH = """
calls = []
def known_level(completions, level):
    return level
def shortness(completions, level):
    calls.append(level)
    return [-0.01 * len(text) for text in completions]
"""


@pytest.fixture
def run_by_functions(tmp_path, monkeypatch):
    """Without a reward model."""
    (tmp_path / "lengths.py").write_text(LENGTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lengths", raising=False)

    def run(*completions, output="out", **options):
        return rejection(RejectionConfig(completions=list(completions), output_dir=str(tmp_path / output), **options))

    yield run
    sys.modules.pop("lengths", None)


def test_only_what_is_right_is_selected(run_by_functions, write_jsonl, capsys):
    """DeepSeek-R1's third step: of many completions, those whose answer is right."""
    folder = run_by_functions(write_jsonl(MATHS), reward_funcs=["exact_answer"], min_reward=1.0, k=9)
    selected = [(line["prompt"], line["completion"]) for line in lines_of(folder / "selected.jsonl")]
    assert selected == [("2 + 2", " It is 4."), ("2 + 3", " 5 cat"), ("2 + 3", " #### 5")]
    scored = lines_of(folder / "scored.jsonl")
    assert [line["reward"] for line in scored] == [1, 0, 1, 1, 0, None]
    assert all("rewards" not in line for line in scored)
    report = json.loads((folder / "report.json").read_text())
    assert report["below_min_reward"] == 2 and report["selected"]["prompts"] == 2
    assert "selected:   3 of 2 prompts, mean reward +1.0000" in capsys.readouterr().out

    folder = run_by_functions(write_jsonl(MATHS), reward_funcs=["exact_answer"], min_reward=1.5, output="none")
    assert (folder / "selected.jsonl").read_text() == ""
    assert "selected:   0 of 0 prompts, none has min_reward" in capsys.readouterr().out


@pytest.mark.parametrize("selection", ["top_k_overall", "random"])
def test_min_reward_goes_before_every_selection(run_by_functions, write_jsonl, selection):
    options = {"reward_funcs": ["exact_answer"], "min_reward": 0.5, "selection": selection}
    for seed in range(4):
        folder = run_by_functions(write_jsonl(MATHS), output=f"out{seed}", k=2, seed=seed, **options)
        assert {line["reward"] for line in lines_of(folder / "selected.jsonl")} == {1}


def test_a_weighted_sum_of_a_reward_model_and_functions(run_by_functions, write_jsonl, word_reward_model):
    folder = run_by_functions(
        write_jsonl(MATHS), reward_model_name_or_path=word_reward_model,
        reward_funcs=["exact_answer", "lengths:shortness"], reward_weights=[10.0, 1.0, 2.0],
    )  # fmt: skip
    scored = lines_of(folder / "scored.jsonl")
    for line in scored[:5]:
        parts = line["rewards"]
        assert list(parts) == ["reward_model", "exact_answer", "shortness"]
        assert parts["shortness"] == pytest.approx(-0.01 * len(line["completion"]))
        expected = 10 * parts["reward_model"] + parts["exact_answer"] + 2 * parts["shortness"]
        assert line["reward"] == pytest.approx(expected)
    assert scored[2]["rewards"]["reward_model"] > 0 and "rewards" not in scored[5]
    assert sys.modules["lengths"].calls == [[1, 1, None, None, None]]


def test_a_function_that_abstains_and_a_prompt_that_opens_thoughts(run_by_functions, write_jsonl):
    rows = [MATHS[0], MATHS[2], MATHS[2] | {"opening": "<think>\n"}]
    folder = run_by_functions(write_jsonl(rows), reward_funcs=["exact_answer", "lengths:known_level"])
    scored = lines_of(folder / "scored.jsonl")
    assert [line["reward"] for line in scored] == [2, 1, 0]
    assert [line["rewards"]["known_level"] for line in scored] == [1, None, None]


def test_functions_are_not_called_again_when_a_run_goes_on(
    run_by_functions, write_jsonl, word_reward_model, monkeypatch
):
    data = write_jsonl(MATHS)
    options = {"reward_funcs": ["lengths:shortness", f"model:{word_reward_model}"]}
    whole = run_by_functions(data, output="whole", **options)
    calls, last_values = sys.modules["lengths"].calls, rlhf_trainer.models.scoring.last_values
    calls.clear()

    def interrupted(model, head, ids, mask):
        if len(ids) > 1:  # not the check of the head
            raise KeyboardInterrupt
        return last_values(model, head, ids, mask)

    monkeypatch.setattr(rlhf_trainer.models.scoring, "last_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_by_functions(data, **options)
    monkeypatch.setattr(rlhf_trainer.models.scoring, "last_values", last_values)
    assert len(calls) == 1
    folder = run_by_functions(data, resume_from_checkpoint=True, **options)
    assert len(calls) == 1
    assert (folder / "scored.jsonl").read_bytes() == (whole / "scored.jsonl").read_bytes()


def test_what_rewards_cannot_use_is_named_before_anything_is_written(run_by_functions, write_jsonl, tmp_path):
    with pytest.raises(UsageError, match=r"train.jsonl, row 2, prompt 'on': the reward 'exact_answer' needs a column"):
        run_by_functions(write_jsonl([MATHS[0], row("on", " cat")]), reward_funcs=["exact_answer"])
    for line, message in (
        (row("a", " b", columns=[1]), "row 1, field 'columns': expected a mapping, got a list"),
        (row("a", " b", opening=1), "row 1, field 'opening': expected text, got int 1"),
        (row(["a"], " b"), r"row 1, field 'prompt\[0\]': expected"),
        (row(7, " b"), "row 1, field 'prompt': expected text or a list of messages, got int"),
        (row("a", 7), "row 1, field 'completion': expected text, as in 'prompt', got int 7"),
    ):
        with pytest.raises(UsageError, match=message):
            run_by_functions(write_jsonl([line]), reward_funcs=["regex:a"])
    with pytest.raises(
        UsageError, match="nothing rewards the completions: pass reward_model_name_or_path or reward_funcs"
    ):
        run_by_functions("none.jsonl")
    with pytest.raises(UsageError, match="min_reward must be a number, got nan"):
        run_by_functions("none.jsonl", reward_funcs=["regex:a"], min_reward=float("nan"))
    assert not partial_folder(tmp_path / "out").exists()


def test_several_processes_are_refused(run, write_jsonl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="rlhf rejection works in one process and was launched in 2"):
        run(write_jsonl(ROWS))
