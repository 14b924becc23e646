"""Completions drawn while earlier iterations train: by which policy, of which prompts, and what a stop leaves."""

import json
import random
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.loading import load_causal_lm
from rlhf_trainer.online import loop
from rlhf_trainer.online.config import GRPOConfig
from rlhf_trainer.rollouts.generation import Sampling, end_ids
from rlhf_trainer.rollouts.http_json import RequestError
from rlhf_trainer.rollouts.sampler import GenerationRequest, LocalSampler
from rlhf_trainer.rollouts.server import ServerSampler
from rlhf_trainer.rollouts.weight_sync import WeightSync
from rlhf_trainer.training.loop import Run
from tests.trainer.online import known_tasks as tasks
from tests.trainer.online.calculator import TEMPLATE
from tests.trainer.rollouts.scripted_server import Scripted, choices
from tests.trainer.training.test_distributed import LAUNCH

SECONDS = 60  # to wait for what comes at once where nothing is broken


class Folder(WeightSync):
    def load(self, server, saved):
        pass


class Server(ServerSampler):
    """As if a server drew: from the model in the folder that was sent to it last."""

    def __init__(self, sampler, way):
        server = SimpleNamespace(url="http://none", lost_connections=0, requests=0, failures=0, seconds=0.0)
        super().__init__(
            [server],
            "policy",
            sampler.tokenizer,
            ends=end_ids(sampler.model, sampler.tokenizer),
            vocabulary=99,
            way=way,
        )
        self.own, self.calls = sampler.model, []  # (which rows, the copy that drew)
        self.before_draw = lambda number: None

    def probe(self, request, server):
        raise RequestError("it scores no prompts", retryable=False)

    def generate(self, requests, sampling, *, seed, number):
        self.before_draw(len(self.calls))
        if self.is_stopped:
            raise CancelledError
        self.calls.append(([request.where for request in requests], self.saved))
        model = load_causal_lm(self.saved, key="model_name_or_path") if self.saved else self.own
        return LocalSampler(model, self.tokenizer, False).generate(requests, sampling, seed=seed, number=number)


@pytest.fixture
def served(monkeypatch):
    """What `make_sampler` gives: a Server, also as `made[-1]`; `change` is called with each."""
    made, make = [], loop.make_sampler

    def sampler(config, *arguments):
        config = SimpleNamespace(use_vllm=False, bf16=False)
        made.append(Server(make(config, *arguments), sampler.way()))
        sampler.change(made[-1])
        return made[-1]

    sampler.way, sampler.change, sampler.made = Folder, lambda one: None, made
    monkeypatch.setattr(loop, "make_sampler", sampler)
    return sampler


def test_each_iteration_is_drawn_by_the_policy_one_update_behind(run, served):
    _, on_policy = run("grpo", max_steps=5, use_vllm=True)
    _, ahead = run("grpo", max_steps=5, use_vllm=True, max_off_policy_steps=1)
    assert [line["rollouts/off_policy_steps"] for line in ahead] == [0, 1, 1, 1, 1]
    one, two = (server.calls for server in served.made)
    assert [rows for rows, _ in one] == [rows for rows, _ in two]
    copies = [saved for _, saved in two]
    assert copies[0] == copies[1] and len(set(copies)) == 4  # of the policy before the first update, and after 1, 2, 3
    gaps = [line["sampling/sampling_logp_difference/max"] for line in ahead]
    assert gaps[0] < 1e-5 and all(gap > 1e-4 for gap in gaps[1:])
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in on_policy)
    # The first iteration is the same one, and so is what the second is drawn by, but for one update.
    assert {name: ahead[0][name] for name in ("reward", "loss")} == {n: on_policy[0][n] for n in ("reward", "loss")}


def test_no_policy_is_older_than_allowed(run, served):
    _, lines = run("grpo", max_steps=6, use_vllm=True, max_off_policy_steps=3)
    assert all(0 <= line["rollouts/off_policy_steps"] <= min(3, line["step"] - 1) for line in lines)
    assert len(served.made[0].calls) == 6


@pytest.mark.parametrize(("ahead", "overlaps"), [(0, False), (1, True)])
def test_drawing_and_training_overlap(run, served, monkeypatch, ahead, overlaps):
    """The second drawing and the first update wait for each other, or with 0 one for the other."""
    draws, updated, update = threading.Event(), threading.Event(), Run.update

    def before_draw(number):
        if number == 1:
            draws.set()
            assert updated.is_set() != overlaps

    def updates(self, *arguments):
        result = update(self, *arguments)
        if not updated.is_set():
            assert draws.wait(SECONDS) if overlaps else not draws.is_set()
            updated.set()
        return result

    served.change = lambda server: setattr(server, "before_draw", before_draw)
    monkeypatch.setattr(Run, "update", updates)
    _, lines = run("grpo", max_steps=2, use_vllm=True, max_off_policy_steps=ahead)
    assert len(lines) == 2 and draws.is_set()


def test_a_killed_run_is_resumed_without_losing_or_repeating_a_prompt(task, run, served, monkeypatch, tmp_path):
    output = str(tmp_path / "out")
    options = {"use_vllm": True, "max_off_policy_steps": 2, "max_steps": 6, "save_steps": 1, "output_dir": output}
    update, trained = Run.update, []

    def updates(self, given, batch, step):
        if step == 4 and not killed.is_set():
            killed.set()
            raise KeyboardInterrupt
        trained.append(
            (step, sorted(episode.row for batch in given.plan for part in batch for episode in given.examples(part)))
        )
        return update(self, given, batch, step)

    killed = threading.Event()
    monkeypatch.setattr(Run, "update", updates)
    with pytest.raises(KeyboardInterrupt):
        run("grpo", **options)
    _, lines = run("grpo", **options, resume_from_checkpoint=True)
    assert [line["step"] for line in lines] == [step for step, _ in trained] == [1, 2, 3, 4, 5, 6]
    assert lines[3]["rollouts/off_policy_steps"] == 0  # drawn anew by the policy that was saved
    rows = [row for _, rows in trained for row in rows]
    assert sorted(rows[:64]) == sorted([*range(1, 17)] * 4)  # four iterations are an epoch


def test_a_run_that_fails_ends_the_drawing(run, served, monkeypatch):
    """Although the next completions are under way, and more are wanted."""
    under_way, over = threading.Event(), threading.Event()

    def before_draw(number):
        if number == 1:
            under_way.set()
            assert over.wait(SECONDS)

    def update(self, *arguments):
        assert under_way.wait(SECONDS)
        raise UsageError("no")

    class Ending(Server):
        def stop(self):
            super().stop()
            over.set()

    monkeypatch.setattr(f"{__name__}.Server", Ending)
    served.change = lambda server: setattr(server, "before_draw", before_draw)
    monkeypatch.setattr(Run, "update", update)
    with pytest.raises(UsageError, match="no"):
        run("grpo", max_steps=9, use_vllm=True, max_off_policy_steps=4)
    assert len(served.made[0].calls) == 1


def test_evaluations_are_of_the_newest_policy(run, served, task, tmp_path):
    options = {"eval_dataset": task["dataset_name"], "eval_steps": 2, "max_steps": 4}
    run("grpo", use_vllm=True, max_off_policy_steps=1, **options)
    calls = served.made[0].calls
    copies = list(dict.fromkeys(saved for _, saved in calls))
    drawn = [("eval" if len(set(rows)) == 16 else "train", copies.index(saved)) for rows, saved in calls]
    # Two before the first update, one after it, one after the second, and then nothing is left to be drawn.
    assert drawn[:4] == [("train", 0), ("train", 0), ("eval", 0), ("train", 1)]
    assert drawn[4:] == [("train", 2), ("eval", 2), ("eval", 3)]
    assert len(served.made[0].copies) == 1


def test_servers_that_are_not_led_draw_ahead_as_well(run, served):
    served.way = lambda: None
    _, lines = run("grpo", max_steps=3, use_vllm=True, max_off_policy_steps=1, weight_sync="none")
    assert len(lines) == 3 and served.made[0].saved == ""


def test_what_went_wrong_in_the_drawing_is_told(run, served):
    def before_draw(number):
        if number == 2:
            raise UsageError("the server is gone")

    served.change = lambda server: setattr(server, "before_draw", before_draw)
    with pytest.raises(UsageError, match="the server is gone"):
        run("grpo", max_steps=4, use_vllm=True, max_off_policy_steps=1)


def test_without_a_server_nothing_is_drawn_ahead(task, tmp_path):
    with pytest.raises(UsageError, match=r"max_off_policy_steps: .* pass use_vllm"):
        GRPOConfig(**task, output_dir=str(tmp_path), max_off_policy_steps=1)


def test_a_sampler_that_is_stopped_sends_no_request(task):
    sampler = ServerSampler([], "policy", None, ends=[], vocabulary=9)
    sampler.stop()
    with pytest.raises(CancelledError):
        sampler.generate([GenerationRequest([1], "a", "row 1")], Sampling(2), seed=0, number=0)


def test_two_processes_train_as_one(task, tmp_path, python):
    """The main one's servers draw ahead; the main one has the environments, and all draw for them."""
    tokenizer = tasks.character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = tasks.save(tmp_path / "model", tasks.small_gpt2(tokenizer, width=16, layers=1), tokenizer)
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{b}"}]} for a in range(4) for b in range(4)]
    talks = {
        "model_name_or_path": model, "dataset_name": tasks.write_rows(tmp_path / "sums.jsonl", rows),
        "reward_funcs": ["regex:[0-9]"], "environment": "tests.trainer.online.calculator:Calculator",
        "max_completion_length": 12,
    }  # fmt: skip
    script, server = str(Path(__file__).with_name("online_stages.py")), Scripted()

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        rng = random.Random(f"{body['prompt']} {body['seed']}")
        ids = [[rng.randrange(12, 16), rng.randrange(12, 16), 17] for _ in range(body.get("n", 1))]
        return choices([{"token_ids": one, "logprobs": {"token_logprobs": [-1.0] * 3}} for one in ids])

    server.answer = answer
    with server.running() as url:
        served = {
            "use_vllm": True, "vllm_server_base_url": url, "server_model": "policy", "weight_sync": "none",
            "max_off_policy_steps": 1,
        }  # fmt: skip
        stages = {
            name: task | {"num_generations": 4, "max_steps": 3, "beta": 0.05} | more
            for name, more in (("grpo, ahead", served), ("grpo, talks", talks))
        }
        (tmp_path / "options.json").write_text(json.dumps(stages))
        for name, launch in (("one", ()), ("two", LAUNCH)):
            done = python(*launch, script, "options.json", name, ACCELERATE_USE_CPU="true", no_proxy="127.0.0.1")
            assert done.returncode == 0, done.stderr
    for stage in stages:
        one, two = (
            [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
        assert len(one) == len(two) == 3
        assert ("rollouts/off_policy_steps" in two[-1]) == (stage == "grpo, ahead")
        assert ("rewards/environment/mean" in two[-1]) == (stage == "grpo, talks")
        for a, b in zip(one, two, strict=True):
            assert {key: value for key, value in a.items() if "seconds" not in key} == {
                key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in b.items() if "seconds" not in key
            }
