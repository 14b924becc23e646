"""`rlhf demo`: the toy language and its measures, and a short run of the whole."""

import json
import math
import random

import pytest
import torch
from matplotlib import image

from rlhf_trainer.errors import UsageError
from rlhf_trainer.studies.config import DemoConfig
from rlhf_trainer.studies.demo import measure as demo_measure
from rlhf_trainer.studies.demo import run as demo
from rlhf_trainer.studies.demo.language import (
    all_prompts,
    hidden_reward,
    is_grammatical,
    make_tokenizer,
    write_review,
)
from rlhf_trainer.studies.tiny import prefers_first
from rlhf_trainer.training.output_folder import CONFIG_FILE


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A demo much shorter than the real one: it need not learn well, but every part of it must run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "REVIEWS_PER_PROMPT", 4)
        patch.setattr(demo, "HELD_OUT_PAIRS_PER_PROMPT", 2)
        sizes = {"lm_steps": 60, "demonstrations": 512, "pairs": 256, "completions": 3, "dpo_epochs": 1}
        return demo.run(DemoConfig(output_dir=str(folder), **sizes))


def test_the_reward_is_what_the_docstring_says():
    assert hidden_reward("the soup was warm . the waiter was rude . i will happily return .") == 1
    assert hidden_reward("the soup was bland . i will sadly not return .") == -2
    assert hidden_reward("the soup") == 0


def test_reviews_are_grammatical_and_as_often_pleased_as_not():
    rng, prompts = random.Random(0), all_prompts()
    reviews = [(prompt, write_review(prompt, rng)) for prompt in prompts * 20]
    assert all(is_grammatical(*pair) for pair in reviews)
    assert not is_grammatical(prompts[0], write_review(prompts[-1], rng))  # of another dish
    assert not is_grammatical(prompts[0], "warm warm")
    rewards = [hidden_reward(review) for _, review in reviews]
    assert abs(sum(rewards) / len(rewards)) < 0.1
    assert {min(rewards), max(rewards)} == {-4, 4}


def test_the_tokenizer_knows_every_word():
    tokenizer, rng = make_tokenizer(), random.Random(0)
    for prompt in all_prompts():
        review = write_review(prompt, rng)
        ids = tokenizer(f"{prompt} {review}").input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{prompt} {review}"
    assert len({len(tokenizer(prompt).input_ids) for prompt in all_prompts()}) == 1  # `sample` relies on it


def test_the_annotator_is_bradley_terry():
    rng = random.Random(0)
    wins = sum(prefers_first(hidden_reward("warm"), hidden_reward("bland"), rng) for _ in range(4000)) / 4000
    assert wins == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)


def test_optimum_reweights_by_the_exponential_of_the_reward():
    """Two rewards, +1 and -1, equally likely: pi*(+1) = sigma(2 / beta), and its KL to (1/2, 1/2) in closed form."""
    beta = 0.7
    p = 1 / (1 + math.exp(-2 / beta))
    reward, kl = demo_measure.optimum([1, -1] * 50, beta)
    assert reward == pytest.approx(2 * p - 1)
    assert kl == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))


def test_pretraining_reads_running_text_without_an_end():
    tokenizer, rng = make_tokenizer(), random.Random(0)
    batch = demo.running_text(tokenizer, all_prompts(), rng)
    assert batch.input_ids.shape == (demo.LM_BATCH, demo.LM_TOKENS) and batch.attention_mask.all()
    assert tokenizer.eos_token_id not in batch.input_ids
    assert tokenizer.decode(batch.input_ids[0]).count("review of the") >= 2
    assert torch.equal(batch.labels, batch.input_ids)


@pytest.mark.xdist_group("demo")  # one worker, one run
def test_a_short_run_leaves_everything(result):
    names = {path.name for path in result.iterdir()}
    stages = {f"{stage}_model" for stage in ("base", "sft", "reward", "rejection", "dpo")}
    assert (
        stages | {"preferences.jsonl", "held_out.jsonl", "completions", "selected", "report.txt", "curves.png"} <= names
    )
    pairs = [json.loads(line) for line in (result / "preferences.jsonl").read_text().splitlines()]
    assert 200 < len(pairs) <= 256 and all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert len((result / "completions" / "completions.jsonl").read_text().splitlines()) == 3 * 90
    height, width, _ = image.imread(result / "curves.png").shape
    assert height > 600 and width > 900
    records = [json.loads(line) for line in (result / "dpo_model" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [record["step"] for record in records[1:]] == [1, 2, 3, 4]


@pytest.mark.xdist_group("demo")
def test_the_report_has_table_and_samples(result):
    text = (result / "report.txt").read_text()
    for phrase in ("hidden reward", "what the reward model says", "KL to the SFT model", "recognised", "optimum"):
        assert phrase in text
    assert text.count("review of the") >= 3
    (kl,) = [line for line in text.splitlines() if "KL to the SFT model" in line]
    sft, rejection, dpo, optimum = (float(word) for word in kl.split()[-4:])
    assert sft == 0.0 <= dpo and min(rejection, optimum) > 0.0
    (recognised,) = [line for line in text.splitlines() if "recognised" in line]
    assert recognised.split()[-4] == "50%" != recognised.split()[-2]


def test_a_second_demo_takes_the_next_free_name(tmp_path):
    config = DemoConfig(output_dir=str(tmp_path / "demo"))
    first, second = demo.make_folder(config), demo.make_folder(config)
    assert (first.name, second.name) == ("demo", "demo-2")
    (first / "report.txt").write_text("x")
    replaced = demo.make_folder(DemoConfig(output_dir=str(first), overwrite_output_dir=True))
    assert replaced == first and [path.name for path in first.iterdir()] == [CONFIG_FILE]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("x")
    with pytest.raises(UsageError, match="not the output of a run"):
        demo.make_folder(DemoConfig(output_dir=str(tmp_path / "mine"), overwrite_output_dir=True))
