"""Optimizers and learning rates, by the names that transformers' TrainingArguments give them."""

import functools
import json
import warnings
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from ..config.base import TrainConfig
from ..errors import UNREADABLE, UsageError

PACKAGES = {"adamw_torch_8bit": "torchao", "adamw_bnb_8bit": "bitsandbytes"}


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Of what trains in the model; UsageError where a package is missing, or the weights are not of the right kind."""
    name, settings = config.optim, {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = settings | {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    rounding = {"bf16_stochastic_round": weights[0].dtype == torch.bfloat16} if name == "adamw_torch_8bit" else {}
    if not rounding:
        warn_of_rounding(max(weights, key=torch.Tensor.numel), config.learning_rate)
    try:
        if name in PACKAGES:
            return import_module(f"{PACKAGES[name]}.optim").AdamW8bit(weights, **adam, **rounding)
        if name == "muon":
            return torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **settings)
        if name == "adafactor":
            return Adafactor(weights, scale_parameter=False, relative_step=False, **settings)
        if name == "rmsprop":
            return torch.optim.RMSprop(weights, **settings)
        return torch.optim.AdamW(weights, fused=name == "adamw_torch_fused", **adam)  # fused: no temporaries as large
    except ImportError as error:
        raise UsageError(f"optim {name} takes the package {PACKAGES[name]}: pip install it ({error})") from error
    except (ValueError, AttributeError) as error:
        raise UsageError(f"optim {name}: {error}") from error


def warn_of_rounding(weight: torch.Tensor, learning_rate: float) -> None:
    """Warns where an update of the learning rate is below half the spacing of most numbers in a bf16 or fp16 weight."""
    lost = (weight.detach().abs().float() * torch.finfo(weight.dtype).eps / 4 > learning_rate).float().mean().item()
    if weight.dtype in (torch.bfloat16, torch.float16) and lost > 0.5:
        warnings.warn(
            f"{weight.dtype}: updates of learning_rate {learning_rate:g} are lost in rounding for {lost:.0%} of the "
            "weights. Train in fp32 (dtype float32), or with optim adamw_torch_8bit, which rounds stochastically",
            stacklevel=2,
        )


def check_warmup(config: TrainConfig, steps: int) -> None:
    """UsageError where a run of `steps` would end inside its warm-up, or cannot have its schedule."""
    if 1 <= config.warmup >= steps:
        raise UsageError(
            f"the run has {steps} steps, and the learning rate would still rise at its end: warmup_steps is "
            f"{config.warmup:g}. Pass warmup_steps 0.1 for a tenth of the run, or lower batch_size, or raise "
            "num_train_epochs"
        )
    learning_rate_at(config, steps, steps)


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ..., steps: a linear warm-up to the peak, then transformers' schedule."""
    warmup = config.warmup_in(steps)
    factor = schedule(config.lr_scheduler_type, config.lr_scheduler_kwargs, config.learning_rate, warmup, steps)
    return config.learning_rate * (step / warmup if step <= warmup else factor(step - 1))


@functools.lru_cache
def schedule(name: str, options: str | None, learning_rate: float, warmup: int, steps: int) -> Callable[[int], float]:
    """transformers' factor of the learning rate after so many steps."""
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        return get_scheduler(name, optimizer, warmup, steps, json.loads(options or "{}")).lr_lambdas[0]
    except UNREADABLE as error:
        raise UsageError(f"lr_scheduler_type {name} with lr_scheduler_kwargs {options}: {error}") from error
