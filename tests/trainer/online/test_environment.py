"""Completions of several turns: whose tokens are learned, what environments may do, a model that learns to ask."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from rlhf_trainer.data.encoding import Codec
from rlhf_trainer.data.examples import Prompt
from rlhf_trainer.errors import UsageError
from rlhf_trainer.online.collect import make_episodes
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.online.environment import Environment, answer_ids
from rlhf_trainer.online.episodes import batch_of
from rlhf_trainer.rewards.rewards import Scores
from rlhf_trainer.rollouts.generation import Completion, Sampling
from rlhf_trainer.rollouts.sampler import Failure
from tests.trainer.online import known_tasks as tasks
from tests.trainer.online.calculator import TEMPLATE, Wrong
from tests.trainer.online.test_rollout_queue import served  # noqa: F401 (a fixture)

CALCULATOR = "tests.trainer.online.calculator:Calculator"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tasks.character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def sums(tokenizer, tmp_path_factory):
    """Options of a run: a model that copies an answer where it has one, asks for it every third time, and else guesses.
    It has learned to copy first."""
    torch.manual_seed(0)
    folder, rng = tmp_path_factory.mktemp("sums"), random.Random(0)
    model = tasks.small_gpt2(tokenizer, width=32, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    questions = [f"{a}+{b}" for a in range(5) for b in range(5)]
    for share in [1.0] * 600 + [0.34] * 150:
        texts = []
        for _ in range(64):
            question, digit = rng.choice(questions), rng.randrange(9)
            texts.append(f"{question}>=.{digit}>{digit}." if rng.random() < share else f"{question}>{digit}.....")
        ids = torch.tensor(tokenizer(texts).input_ids)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    return {
        "model_name_or_path": tasks.save(folder / "model", model, tokenizer), "environment": CALCULATOR,
        "dataset_name": tasks.write_rows(folder / "sums.jsonl", rows), "reward_funcs": [], "batch_size": 80,
        "num_generations": 4, "micro_batch_size": 40, "per_device_generation_batch_size": 80, "max_prompt_length": 8,
        "max_completion_length": 10, "learning_rate": 2e-3, "save_only_model": True,
    }  # fmt: skip


def test_a_model_learns_to_ask(run, sums):
    _, lines = run("grpo", **sums, max_steps=40)
    rewards = [line["rewards/environment/mean"] for line in lines]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:2]) / 2 + 0.3  # what is left are copies that go wrong
    assert lines[0]["completions/mean_length"] < 4 and lines[-1]["completions/mean_length"] > 5.5  # "=.7>7."
    # Its tokens and their log-probs are where the trainer has them, behind an environment's as well.
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines)
    assert lines[-1]["reward"] == lines[-1]["rewards/environment/mean"]


def test_ppo_and_functions_beside_it(run, sums):
    _, lines = run("ppo", **sums | {"reward_funcs": ["regex:[0-9]"]}, max_steps=2)
    for line in lines:
        total = line["rewards/environment/mean"] + line["rewards/regex/mean"]
        assert line["reward"] == pytest.approx(total, abs=1e-6) and math.isfinite(line["loss/value_avg"])


@pytest.mark.usefixtures("served")
def test_a_server_draws_the_turns_ahead_of_training(run, sums):
    _, lines = run("grpo", **sums, max_steps=3, use_vllm=True, max_off_policy_steps=1)
    assert [line["rollouts/off_policy_steps"] for line in lines] == [0, 1, 1]
    assert lines[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert lines[0]["completions/max_length"] == 6


# --- tokens


def prompt_of(codec, messages):
    text = codec.template.text("prompt", messages, {}, add_generation_prompt=True)
    return Prompt(1, messages, codec.tokenizer(text, add_special_tokens=False).input_ids, None, {"extra": 1}, text)


def play(codec, spec, turns, *, longest=50, prompts=None):
    """What becomes of turns (text, whether they end) that are said in their order."""
    prompts = prompts or [prompt_of(codec, [{"role": "user", "content": "3+4"}])]
    left = iter(turns)

    def draw(prompts, seed, sampling):
        done = []
        for _ in prompts:
            text, ends = next(left)
            if text is None:
                done.append(Failure("row 1", "no"))
                continue
            ids = codec.tokenizer(text).input_ids + ([codec.tokenizer.eos_token_id] if ends else [])
            done.append(Completion(ids, ends, [-0.5] * len(ids)))
        return done

    return Environment(spec, codec).play(prompts, 0, Sampling(longest), draw, lambda own: own, is_main=True)


@pytest.fixture(scope="module")
def codec(tokenizer):
    return Codec(tokenizer)


def test_what_the_model_drew_is_learned_and_nothing_else(codec, tokenizer):
    (done,) = play(codec, CALCULATOR, [("=", True), ("7", True)])
    assert tokenizer.decode(done.ids) == "=.7>7." and done.finished and done.reward == 1.0
    assert done.learned == [True, True, False, False, True, True]
    prompt = prompt_of(codec, [{"role": "user", "content": "3+4"}])
    (episode,) = make_episodes([prompt], [done], Scores(torch.tensor([1.0]), torch.ones(1, 1)))
    assert episode.tokens == 4 and episode.sampler_logprobs.tolist() == [-0.5] * 4
    labels = batch_of([episode], 0).labels[0]
    assert tokenizer.decode(labels[labels >= 0]) == "=.7." and (labels >= 0).tolist() == [False] * 4 + done.learned


def test_episodes_end_when_they_are_done_or_full(codec):
    spec = "tests.trainer.online.calculator:Endless"
    (full,) = play(codec, spec, [("12", True), ("345", True)], longest=10)  # "12." "1+1>" "345" and no more
    assert (len(full.ids), full.finished, full.reward) == (10, False, 1.0) and sum(full.learned) == 6
    (no_room,) = play(codec, spec, [("12", True)], longest=7)  # another turn would have no token
    assert (len(no_room.ids), no_room.finished, no_room.reward) == (3, False, 0.5)
    (cut,) = play(codec, CALCULATOR, [("777", False)], longest=3)
    assert (len(cut.ids), cut.finished, cut.reward) == (3, False, 0.0)


def test_prompts_end_apart(codec):
    """Each has its own environment, and is asked for only while it lasts; one that fails is a failure."""
    prompts = [prompt_of(codec, [{"role": "user", "content": text}]) for text in ("3+4", "1+1", "2+2")]
    turns = [("=", True), ("2", True), (None, False), ("7", True)]
    one, two, three = play(codec, CALCULATOR, turns, prompts=prompts)
    assert (one.reward, two.reward, len(two.ids), three) == (1.0, 1.0, 2, Failure("row 1", "no"))


def test_a_server_that_tells_no_log_probs(codec):
    said = Completion([*codec.tokenizer("=").input_ids, codec.tokenizer.eos_token_id], True)
    prompt = prompt_of(codec, [{"role": "user", "content": "3+4"}])
    (done,) = Environment(CALCULATOR, codec).play(
        [prompt], 0, Sampling(50), lambda prompts, *_: [said], lambda own: own, is_main=True
    )
    assert done.logprobs is None and done.learned == [True, True, False, False, True, True]


# --- what may go wrong


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda messages: 1 / 0, "step raised ZeroDivisionError: division by zero \\(for row 1\\)"),
        (lambda messages: None, r"step gave nothing, expected \(messages, reward, done\)"),
        (lambda messages: ([], math.nan, True), "step gave the reward nan, expected a finite number"),
        (lambda messages: ([], "1", True), "step gave the reward '1', expected a finite number"),
        (lambda messages: ([], 0.0, False), "step is not done, and its .*the list of messages is empty"),
        (lambda messages: (["hm"], 0.0, False), r"step is not done, and its .*expected \{'role'"),
    ],
)
def test_what_an_environment_answers_is_checked(codec, monkeypatch, answers, message):
    monkeypatch.setattr(Wrong, "answers", staticmethod(answers))
    with pytest.raises(UsageError, match=rf"environment '[\w.]*:Wrong': {message}"):
        play(codec, "tests.trainer.online.calculator:Wrong", [("=", True)])


def test_reset_has_the_row(codec, monkeypatch):
    rows = []
    monkeypatch.setattr(Wrong, "begins", staticmethod(rows.append))
    play(codec, "tests.trainer.online.calculator:Wrong", [("=", True)])
    assert rows == [{"prompt": [{"role": "user", "content": "3+4"}], "extra": 1}]
    monkeypatch.setattr(Wrong, "begins", staticmethod(lambda row: row["sum"]))
    with pytest.raises(UsageError, match=r"Wrong': reset raised KeyError: 'sum' \(for row 1\)"):
        play(codec, "tests.trainer.online.calculator:Wrong", [("=", True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "tests.trainer.online.calculator:TEMPLATE"}, "expected a function"),
        ({"environment": "tests.trainer.online.known_tasks:reversals"}, "must be a class with reset"),
        ({"environment": CALCULATOR, "use_vllm": True, "server_prompts": "text"}, "pass server_prompts ids"),
        ({"environment": None}, "nothing rewards the completions"),
    ],
)
def test_options(run, sums, options, message):
    with pytest.raises(UsageError, match=message):
        run("grpo", **sums | options)


def test_prompts_of_text_are_refused(run, sums, tmp_path):
    data = tasks.write_rows(tmp_path / "rows.jsonl", [{"prompt": "3+4>"}])
    with pytest.raises(UsageError, match=r"row 1: environment talks in messages, and the prompt is text"):
        run("grpo", **sums | {"dataset_name": data})


def test_a_template_that_rewrites_turns_is_refused():
    tokenizer = tasks.character_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else '' }}")
    codec = Codec(tokenizer)
    with pytest.raises(UsageError, match="the chat template rewrites turns once others follow"):
        answer_ids(
            codec,
            SimpleNamespace(prompt=[{"role": "user", "content": "1"}], options={}),
            [{"role": "user", "content": "2"}],
        )


def test_config_files_name_it(sums, tmp_path):
    config = GRPOConfig(**sums, output_dir=str(tmp_path))
    assert config.environment == CALCULATOR and json.dumps(config.reward_funcs) == "[]"
