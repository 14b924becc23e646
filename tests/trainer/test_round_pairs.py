"""Which pairs `rlhf rounds` makes of scored completions, by worked examples."""

import pytest

from rlhf_trainer.rounds import pair_up, pairs_among


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
