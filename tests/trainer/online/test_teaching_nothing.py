"""Completions that have no part in the gradient cost a forward pass, for the metrics, and no backward pass; weights and
metrics are what they are with it."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file

from rlhf_trainer.online.algorithm import EpisodeTask
from rlhf_trainer.online.grpo import GRPO

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "sapo"]
SMALL = {"num_generations": 2, "micro_batch_size": 2, "max_steps": 2}
ALWAYS = {"reward_funcs": ["regex:(?s)"], "weight_decay": 0.1}  # each completion has it


@pytest.fixture
def counted(run, monkeypatch):
    """counted("grpo", **options) -> (weights, lines without seconds, number of forward passes, of backward passes)."""
    passes = {"forward": 0, "backward": 0}
    backward, compute_loss = Accelerator.backward, EpisodeTask.compute_loss

    def count(name, function):
        def counting(*arguments):
            passes[name] += 1
            return function(*arguments)

        return counting

    monkeypatch.setattr(Accelerator, "backward", count("backward", backward))
    monkeypatch.setattr(EpisodeTask, "compute_loss", count("forward", compute_loss))

    def train(algorithm, **options):
        passes.update(forward=0, backward=0)
        folder, lines = run(algorithm, **SMALL | options)
        names = [path.name for path in folder.glob("*.safetensors")]
        lines = [{name: value for name, value in line.items() if "second" not in name} for line in lines]
        return load_file(folder / names[0]), lines, passes["forward"], passes["backward"]

    return train


def without_skipping(monkeypatch):
    monkeypatch.setattr(EpisodeTask, "idle", property(lambda self: frozenset(), lambda self, idle: None), raising=False)


def without_sorting(monkeypatch):
    monkeypatch.setattr(GRPO, "idle", lambda self, episodes, beta: set())


@pytest.mark.parametrize("options", [
    *({"loss_type": loss_type} for loss_type in LOSS_TYPES),
    {"num_iterations": 2, "num_mini_batches": 2}, {"gradient_checkpointing": True}, {"bf16": True},
    {"use_peft": True, "lora_target_modules": ["all-linear"], "lora_dropout": 0.3, "micro_batch_size": 4},
    {"mask_truncated_completions": True, "max_completion_length": 3},
], ids=str)  # fmt: skip
def test_weights_and_metrics_are_those_with_every_backward_pass(counted, monkeypatch, options):
    weights, lines, forward, backward = counted("grpo", **options)
    assert any(0 < line["frac_reward_zero_std"] < 1 for line in lines)
    assert 0 < backward < forward
    without_skipping(monkeypatch)
    whole, whole_lines, whole_forward, whole_backward = counted("grpo", **options)
    assert whole_backward == whole_forward == forward
    assert lines == whole_lines and weights.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in weights.items())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "rloo"])  # means of completions, of tokens, of sums
def test_gradients_do_not_depend_on_which_share_a_micro_batch(counted, monkeypatch, loss_type):
    _, (line,), forward, _ = counted("grpo", loss_type=loss_type, max_steps=1)
    without_sorting(monkeypatch)
    _, (other,), whole_forward, whole_backward = counted("grpo", loss_type=loss_type, max_steps=1)
    assert forward == whole_forward == whole_backward
    assert line["grad_norm"] > 0
    for name, value in line.items():
        assert value == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("options", [{}, {"loss_type": "reinforce"}], ids=str)
def test_where_none_teaches_the_optimizer_steps_with_gradients_of_zero(counted, monkeypatch, task, options):
    weights, lines, forward, backward = counted("grpo", **ALWAYS, **options)
    assert (forward, backward) == (2 * 8, 2) and [line["grad_norm"] for line in lines] == [0, 0]
    without_skipping(monkeypatch)
    whole, whole_lines, *_ = counted("grpo", **ALWAYS, **options)
    assert lines == whole_lines and all(torch.equal(weight, whole[name]) for name, weight in weights.items())
    before = load_file(f"{task['model_name_or_path']}/model.safetensors")
    assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())  # they have decayed


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {"beta": 0.1, "kl_in": "loss"}), ("grpo", {"beta": 0.1, "kl_in": "reward"}), ("ppo", {"beta": 0.0}),
], ids=str)  # fmt: skip
def test_what_has_another_gradient_is_learned_from(counted, algorithm, options):
    *_, forward, backward = counted(algorithm, **ALWAYS, **options, max_steps=1)
    assert forward == backward > 0


def test_the_balance_of_experts_has_a_gradient_of_every_completion(counted, monkeypatch):
    monkeypatch.setattr(transformers.GPT2Model, "aux_coefficient", 0.1, raising=False)
    monkeypatch.setattr(transformers.GPT2Model, "aux_loss", torch.tensor(0.5), raising=False)
    *_, forward, backward = counted("grpo", **ALWAYS)
    assert forward == backward > 0
