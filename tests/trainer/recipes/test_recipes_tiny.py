"""The tiny twins of the published recipes, whole: each stage raises what it is meant to, on prompts held out from it.

Margins are about half of what these seeds gave; measures are over 384 reviews and 240 sums at least, so their standard
errors are below 0.1 (reward) and 0.03 (shares).
"""

import copy
import itertools
import json
import random

import pytest

from rlhf_trainer.recipes.config import RecipeConfig
from rlhf_trainer.recipes.run import run_recipe
from rlhf_trainer.recipes.steps import join, right_where_known
from rlhf_trainer.studies.demo import tiny_world
from rlhf_trainer.studies.demo.tiny_world import ALL_SUMS, answer, compare, compared, kind, reward_of, right_in_form
from rlhf_trainer.training.files import checksum

REWARD, LANGUAGE, RIGHT, FORM = (
    "reviews, hidden reward", "reviews in the language", "sums right and in form", "sums in form",
)  # fmt: skip


class Pretraining:
    """`train_lm`, which trains once on the same batches from the same weights: two recipes each share a base model."""

    def __init__(self, train_lm):
        self.train_lm, self.results = train_lm, {}

    def __call__(self, model, draw, steps, peak):
        batches = [draw() for _ in range(steps)]  # the recipe's later draws go on from here
        tensors = [*model.state_dict().values(), *itertools.chain.from_iterable(batches)]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors if tensor is not None)
        key = checksum(content + repr(peak).encode())
        if key not in self.results:
            loss = self.train_lm(model, iter(batches).__next__, steps, peak)
            self.results[key] = loss, copy.deepcopy(model.state_dict())
        loss, weights = self.results[key]
        model.load_state_dict(weights)
        return loss


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """name -> the measures of the recipe's last stage, by model."""

    def run(name):
        folder = run_recipe(RecipeConfig(recipe=name, output_dir=str(tmp_path_factory.mktemp(name) / "out")))
        return json.loads((folder / "measured" / "report.json").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_world, "train_lm", Pretraining(tiny_world.train_lm))
        yield run


@pytest.mark.xdist_group("tiny recipes")  # one worker, which pretrains once for two recipes
def test_zephyr(measured):
    """SFT teaches to write one review and to stop; DPO, what the annotator likes."""
    base, sft, dpo = measured("zephyr-tiny").values()
    assert base[LANGUAGE] < 0.1 and sft[LANGUAGE] > 0.6
    assert dpo[REWARD] > sft[REWARD] + 0.5
    assert dpo[LANGUAGE] > 0.6


@pytest.mark.xdist_group("tiny recipes")
def test_instructgpt(measured):
    """The hidden reward rises, though PPO never meets it: the reward model that it maximises has learned it."""
    base, sft, ppo = measured("instructgpt-tiny").values()
    assert base[LANGUAGE] < 0.1 and sft[LANGUAGE] > 0.6
    assert ppo[REWARD] > sft[REWARD] + 0.5
    assert ppo[LANGUAGE] > 0.6


@pytest.mark.xdist_group("tiny recipes")
def test_tulu3(measured):
    """DPO raises what it compares, reviews; RL with a verifiable reward what it verifies, sums."""
    base, sft, dpo, rlvr = measured("tulu3-tiny").values()
    assert base[FORM] < 0.1 and sft[FORM] > 0.8
    assert dpo[REWARD] > sft[REWARD] + 0.3
    assert rlvr[RIGHT] > dpo[RIGHT] + 0.08
    assert rlvr[REWARD] > sft[REWARD] + 0.1  # what DPO has taught is not forgotten


@pytest.mark.xdist_group("tiny recipes")
def test_deepseek_r1(measured):
    """Step 2 raises reasoning; step 3 learns it anew, with all else; step 4 raises that, reasoning nearly stays."""
    base, cold_start, reasoning, sft, everything = measured("deepseek_r1-tiny").values()
    assert base[FORM] < 0.1 and cold_start[FORM] > 0.8
    assert reasoning[RIGHT] > cold_start[RIGHT] + 0.12
    assert sft[RIGHT] > cold_start[RIGHT] - 0.03 and sft[LANGUAGE] > reasoning[LANGUAGE] + 0.4
    assert everything[REWARD] > sft[REWARD] + 1.0
    assert everything[RIGHT] > sft[RIGHT] - 0.12


def test_people_are_right_when_they_are_careful_and_only_then():
    rng = random.Random(0)
    for prompt in ALL_SUMS:
        assert reward_of(prompt, answer(prompt, rng, {"careful": 1})) == 1.0
        assert reward_of(prompt, answer(prompt, rng, {"hasty": 1})) == 0.0
        assert reward_of(prompt, answer(prompt, rng, {"bare": 1})) == 0.0  # right, and not in form


def test_rewards_are_for_their_own_kind_of_prompt():
    prompts, careful = ["1 + 2 =", "review of the soup at the mill :"], "<think> x </think> <answer> 3 </answer>"
    assert right_in_form(prompts, [careful, careful]) == [1.0, 0.0]
    assert kind(prompts, ["the soup was warm .", "the soup was warm ."]) == [0.0, 1.0]
    assert kind(prompts, ["", "warm warm warm"]) == [0.0, 0.0]  # kind words alone are no review
    assert right_where_known(prompts, [careful, careful], ground_truth=["3", None]) == [1.0, 0.0]
    assert right_where_known([[{"role": "user", "content": "1 + 2"}]], [[{"role": "assistant", "content": "3"}]]) == [0]


def test_of_a_sum_the_right_answer_is_preferred():
    rng = random.Random(0)
    for prompt in ALL_SUMS:
        row = compared(prompt, rng)
        assert reward_of(prompt, row["chosen"]) > reward_of(prompt, row["rejected"])


def test_all_pairs_of_what_was_sampled_are_compared(tmp_path):
    def line(prompt, completion, finished=True):
        return {"prompt": prompt, "completion": completion, "finished": finished}

    right = "<think> x </think> <answer> 3 </answer>"
    lines = [line("1 + 2 =", "4"), line("1 + 2 =", right), line("1 + 2 =", right), line("1 + 2 =", "5", finished=False)]
    lines += [line("1 + 1 =", "2"), line("1 + 1 =", "")]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    compare(tmp_path, completions=str(tmp_path))
    (row,) = map(json.loads, (tmp_path / "preferences.jsonl").read_text().splitlines())
    assert row == {"prompt": "1 + 2 =", "responses": ["4", right], "pairs": [[1, 0]]}
    join(tmp_path, files=[str(tmp_path / "completions.jsonl"), str(tmp_path / "preferences.jsonl")])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 7
