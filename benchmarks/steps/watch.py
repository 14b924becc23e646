"""Times and memory of any trainer's optimisation steps, through torch's own global hooks.

- A step lasts from its turn's begin to the end of optimizer.step(): batch, forward, backward, clipping, update, and the
  logging of the step before.
- Its gradients take from its first forward with gradients to the begin of optimizer.step(): forward, backward,
  clipping. What a trainer does between steps is left out.
- Memory is how far the process's high-water mark rises while gradients are computed above what is resident before,
  less the gradients themselves. Weights and optimizer state are resident by then, so what remains is activations,
  logits and other scratch: the most of any timed step. Linux only: it reads, and resets, VmHWM.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.harness.peak_memory import new_mark_mib, status_mib


@dataclass
class Step:
    """Seconds at which its phases begin."""

    started: float
    forward: float = 0.0
    update: float = 0.0
    ended: float = 0.0
    held_mib: float = 0.0
    extra_mib: float = 0.0


@dataclass
class Watch:
    """`wait_for_turn` is called before every step and after the last one."""

    wait_for_turn: Callable[[], None]
    steps: list[Step] = field(default_factory=list)
    current: Step | None = None

    def __post_init__(self) -> None:
        self.hooks = [
            register_module_forward_pre_hook(self.before_forward),
            register_optimizer_step_pre_hook(self.before_update),  # of every optimizer in the process
            register_optimizer_step_post_hook(self.after_update),
        ]

    def begin(self) -> Step:
        self.wait_for_turn()
        self.current = Step(time.perf_counter())
        return self.current

    def before_forward(self, _module: nn.Module, _arguments: tuple) -> None:
        if not torch.is_grad_enabled():
            return  # the reference's
        step = self.current or self.begin()  # the first one
        if not step.held_mib:
            step.held_mib = new_mark_mib()
            step.forward = time.perf_counter()

    def before_update(self, optimizer: torch.optim.Optimizer, _arguments: tuple, _options: dict) -> None:
        step = self.current
        step.update = time.perf_counter()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        step.extra_mib = status_mib("VmHWM") - step.held_mib - sum(g.nbytes for g in gradients) / 2**20

    def after_update(self, _optimizer: torch.optim.Optimizer, _arguments: tuple, _options: dict) -> None:
        self.current.ended = time.perf_counter()
        self.steps.append(self.current)
        self.begin()

    def columns(self, warm_up: int) -> dict:
        """The times of all steps but the first `warm_up`."""
        timed = self.steps[warm_up:]
        return {
            "step_ms": [round(1e3 * (step.ended - step.started), 2) for step in timed],
            "gradients_ms": [round(1e3 * (step.update - step.forward), 2) for step in timed],
            "peak_extra_mib": round(max(step.extra_mib for step in timed), 1),
        }
