"""Optimizers and schedules by name: transformers' own, and refused where their package is missing."""

import json
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from rlhf_trainer.config.base import TrainConfig
from rlhf_trainer.errors import UsageError
from rlhf_trainer.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from rlhf_trainer.training.optimizers import PACKAGES, check_warmup, learning_rate_at, make_optimizer

SCHEDULES = {
    "cosine_with_restarts": '{"num_cycles": 2}', "polynomial": '{"power": 2.0}', "inverse_sqrt": None,
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}', "cosine_warmup_with_min_lr": '{"min_lr": 0.002}',
    "warmup_stable_decay": '{"num_decay_steps": 5}',
}  # fmt: skip


def config(**options):
    return TrainConfig(
        **{"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "learning_rate": 1e-2} | options
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_behind_the_warm_up_schedules_are_those_of_transformers(name):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    kwargs = {} if SCHEDULES[name] is None else json.loads(SCHEDULES[name])
    theirs = get_scheduler(name, optimizer, 3, 20, kwargs)
    ours = config(lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name], warmup_steps=3)
    for step in range(1, 21):
        rate = learning_rate_at(ours, step, 20)
        assert rate == pytest.approx(theirs.get_last_lr()[0] if step > 3 else 1e-2 * step / 3)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("name", "options"),
    [("warmup_stable_decay", None), ("cosine_with_min_lr", "{}"), ("cosine", '{"width": 3}'), ("cosine", "{")],
)
def test_a_schedule_that_cannot_be_had_is_refused_before_training(name, options):
    with pytest.raises(UsageError, match=f"lr_scheduler_type {name} with lr_scheduler_kwargs"):
        check_warmup(config(lr_scheduler_type=name, lr_scheduler_kwargs=options), 10)


def matrices(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)).to(dtype)
    return model


def steps_of(model, optimizer, count):
    for _ in range(count):
        model(torch.linspace(-1, 1, 128).view(2, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def available(name):
    missing = name in PACKAGES and find_spec(PACKAGES[name]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{PACKAGES.get(name)} is not installed"))


NAMES = ["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_bnb_8bit", "rmsprop", "adafactor", "muon"]


@pytest.mark.parametrize("name", map(available, NAMES))
def test_every_optimizer_learns_and_goes_on_to_the_bit(name, tmp_path):
    whole, broken, resumed = (matrices() for _ in range(3))
    optimizer = make_optimizer(config(optim=name), whole)
    steps_of(whole, optimizer, 4)
    assert not torch.equal(whole[0].weight, broken[0].weight)

    optimizer = make_optimizer(config(optim=name), broken)
    steps_of(broken, optimizer, 2)
    save_checkpoint(tmp_path, 2, broken, optimizer, {})
    optimizer = make_optimizer(config(optim=name), resumed)
    load_checkpoint(newest_checkpoint(tmp_path), resumed, optimizer)
    steps_of(resumed, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_options_reach_adam():
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    defaults = make_optimizer(config(optim="adamw_torch", **options), matrices()).defaults
    assert (defaults["betas"], defaults["eps"], defaults["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)
    with pytest.raises(UsageError, match="optim adamw_torch: Invalid beta parameter"):
        make_optimizer(config(optim="adamw_torch", adam_beta1=1.5), matrices())


def test_frozen_weights_are_left_out():
    model = matrices()
    model[0].requires_grad_(False)
    (group,) = make_optimizer(config(), model).param_groups
    assert group["params"] == [model[1].weight]


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UsageError, match=f"optim {name} takes the package {package}: pip install it"):
        make_optimizer(config(optim=name), matrices())


def test_muon_is_for_matrices():
    with pytest.raises(UsageError, match="optim muon: Muon only supports 2D parameters"):
        make_optimizer(config(optim="muon"), nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("dtype", "rate", "warns"), [("bfloat16", 1e-6, 1), ("bfloat16", 1e-2, 0), ("float32", 1e-6, 0)]
)
def test_a_rate_that_moves_nothing_in_bf16_warns(dtype, rate, warns):
    """And it moves nothing."""
    model = matrices(getattr(torch, dtype))
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make_optimizer(config(learning_rate=rate, optim="adamw_torch"), model)
    assert [
        str(one.message).startswith("torch.bfloat16: updates of learning_rate 1e-06 are lost") for one in caught
    ] == [True] * warns
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = (model[0].weight != before).float().mean()
    assert moved < 0.5 if warns else moved > 0.5
