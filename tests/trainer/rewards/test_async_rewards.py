"""Async reward functions: awaited together and beside the others, with the same checks, errors and kept results."""

import json
import sys

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.rewards.config import RejectionConfig, RewardsConfig
from rlhf_trainer.rewards.loading import load_rewards
from rlhf_trainer.rewards.rejection import rejection
from tests.trainer.rewards.test_rewards import TEXTS, THREE

FUNCTIONS = """
import asyncio
import sys
import threading

BOUND_S = 60  # where functions do not run at once, the test fails after it
calls, loops, broken = [], [], True
first_began, second_began = asyncio.Event(), asyncio.Event()
awaited_began, plain_ended, cancelled = threading.Event(), threading.Event(), threading.Event()

async def first(completions):
    first_began.set()
    await asyncio.wait_for(second_began.wait(), BOUND_S)
    return [float(len(text)) for text in completions]

async def second(completions):
    second_began.set()
    await asyncio.wait_for(first_began.wait(), BOUND_S)
    return [None, 2.0, 3.0]

async def awaited(prompts):
    awaited_began.set()
    assert await asyncio.to_thread(plain_ended.wait, BOUND_S)
    return [0.5] * len(prompts)

def plain(prompts):
    assert awaited_began.wait(BOUND_S)
    plain_ended.set()
    return [1.0] * len(prompts)

async def forever(prompts):
    awaited_began.set()
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()

def fails_beside(prompts):
    assert awaited_began.wait(BOUND_S)
    raise ValueError("not today")

async def keeps_loop(prompts):
    loops.append(asyncio.get_running_loop())
    return [0.0] * len(prompts)

async def raises(prompts):
    await asyncio.sleep(0)
    if "bad" in prompts:
        raise KeyError("no such key")
    return [0.0] * len(prompts)

async def raises_on_many(prompts):
    if len(prompts) > 1:
        raise RuntimeError("too many")
    return [0.0]

async def leaves(prompts):
    sys.exit("enough")

async def gives_up(prompts):
    raise asyncio.CancelledError("gone")

async def short(prompts): return [1.0]
async def nan(prompts): return [1.0, float("nan"), 1.0]
async def silent(prompts): return [None] * len(prompts)

class Judge:
    async def __call__(self, completions, level=None):
        return [float(text == "xx") for text in completions]
judge = Judge()

async def lengths(completions):
    calls.append("lengths")
    return [-float(len(text)) for text in completions]

def levels(completions, level):
    calls.append("levels")
    return level

async def fails_at_first(completions):
    calls.append("fails_at_first")
    if broken:
        raise ConnectionError("refused")
    return [0.25] * len(completions)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "waiting.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "waiting", raising=False)
    yield
    sys.modules.pop("waiting", None)


def load(*names, **options):
    config = RewardsConfig(output_dir="out", reward_funcs=[f"waiting:{name}" for name in names], **options)
    return load_rewards(config, torch.device("cpu"))


def test_two_that_wait_for_each_other_and_one_that_abstains():
    rewards = load("first", "second", reward_weights=[1.0, 10.0])
    total, parts = rewards(THREE, TEXTS)
    assert total.tolist() == [1, 22, 33] and parts[:, 1].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("names", [("awaited", "plain"), ("plain", "awaited")])
def test_others_run_while_they_are_awaited_and_parts_keep_their_places(names):
    rewards = load(*names)
    parts = rewards(THREE, TEXTS).parts
    assert rewards.names == names
    assert parts.tolist() == [[{"awaited": 0.5, "plain": 1.0}[name] for name in names]] * 3


def test_an_object_may_be_awaited():
    assert load("judge")(THREE, TEXTS).total.tolist() == [0, 1, 0]


def test_all_calls_share_a_loop_so_that_a_client_may_stay_open():
    rewards = load("keeps_loop", "keeps_loop")
    for _ in range(2):
        rewards(THREE, TEXTS)
    loops = sys.modules["waiting"].loops
    assert len(loops) == 4 and len(set(map(id, loops))) == 1 and loops[0].is_running()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"'waiting:raises' raised KeyError: 'no such key' \(for row 2, prompt 'bad'; .*waiting.py:\d+, in"),
        ("raises_on_many", r"raised RuntimeError: too many \(for all prompts together; .*, in raises_on_many\)"),
        ("leaves", r"'waiting:leaves' raised SystemExit: enough \(for row 1, prompt 'a'"),
        ("gives_up", r"'waiting:gives_up' raised CancelledError"),
        ("short", r"'waiting:short' gave 1 values for 3 completions"),
        ("nan", r"'waiting:nan' gave float nan, expected a finite number \(for row 2, prompt 'bad'\)"),
        ("silent", r"no reward function has a value for a completion of row 1"),
    ],
)
def test_a_bad_one_and_the_prompt_are_named_and_the_others_go_on(name, message):
    with pytest.raises(UsageError, match=message):
        load(name)(THREE, TEXTS)
    if name != "silent":
        with pytest.raises(UsageError, match=message):
            load("judge", name, "lengths")(THREE, TEXTS)
    assert load("judge", "lengths")(THREE, TEXTS).total.tolist() == [-1, -1, -3]


@pytest.mark.parametrize("names", [("forever", "fails_beside"), ("fails_beside", "forever")])
def test_where_another_fails_they_are_cancelled(names):
    with pytest.raises(UsageError, match=r"'waiting:fails_beside' raised ValueError: not today"):
        load(*names)(THREE, TEXTS)
    assert sys.modules["waiting"].cancelled.wait(60)


def test_no_prompts_start_nothing():
    assert load("forever", "lengths")([], []).parts.shape == (0, 2)
    assert not sys.modules["waiting"].awaited_began.is_set() and sys.modules["waiting"].calls == []


def test_results_are_kept_and_what_was_kept_is_not_awaited_again(tmp_path):
    rows = [
        {"prompt": "2 + 2", "completion": text, "finished": True, "row": 1, "model": "m", "columns": {"level": 1}}
        for text in ("4", "four")
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"waiting:{name}" for name in ("lengths", "fails_at_first", "levels")]
    options = {"completions": ["completions.jsonl"], "output_dir": str(tmp_path / "out"), "reward_funcs": names}
    with pytest.raises(UsageError, match="'waiting:fails_at_first' raised ConnectionError: refused"):
        rejection(RejectionConfig(**options))
    module = sys.modules["waiting"]
    assert sorted(module.calls) == ["fails_at_first"] * 2 + ["lengths", "levels"]  # once with all, once with the first
    module.broken = False
    module.calls.clear()
    folder = rejection(RejectionConfig(**options, resume_from_checkpoint=True))
    assert module.calls == ["fails_at_first"]
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [line["rewards"] for line in scored] == [
        {"lengths": -length, "fails_at_first": 0.25, "levels": 1.0} for length in (1.0, 4.0)
    ]
