"""What a DPO step takes until its gradients are there, for any trainer: the reference's forward, the policy's forward
and backward. Clipping, the optimizer and what a trainer does between steps are left out.

- step_ms, step_cpu_ms: of these parts, together; step_cpu_ms is processor time of all threads. A trainer marks them
  with `timed`, or has its own functions wrapped (`wrap`), which costs it microseconds. TRL and the plain loop compute
  the reference's log-probs within the step, of a reference model that they hold. `rlhf dpo` computes them once before
  training, for all epochs; here the reference's forward for a step's pairs is added to that step.
- peak_extra_mib: how far the process's high-water mark rises, in a part, above what is resident when it begins, less
  the gradients that are there when it ends. Weights (a reference model's too, where there is one) and optimizer state
  are resident by then, so what remains is activations, logits and other scratch: the most of any timed step. Free
  memory is given back before each part begins, and the mark starts over. Linux only: it reads, and resets, VmHWM.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def status_mib(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def new_mark_mib() -> float:
    """What is resident now, from where the high-water mark starts over."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what a step needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    return status_mib("VmRSS")


@dataclass
class Part:
    """One reference forward, or all the marked parts between two updates."""

    held_mib: float
    wall_s: float = 0.0
    cpu_s: float = 0.0
    extra_mib: float = 0.0


class Parts:
    def __init__(self) -> None:
        self.started = self.ended = time.perf_counter()
        self.before_steps_s: float | None = None
        self.references: list[Part] = []  # computed outside of steps, in the order of the steps
        self.steps: list[Part] = []
        self.current: Part | None = None
        self.hook = register_optimizer_step_post_hook(self.after_step)  # of every optimizer in the process

    @contextmanager
    def timed(self, reference: bool = False) -> Iterator[None]:
        """`reference`: a reference forward outside of a step, for the step of the same number."""
        if self.before_steps_s is None and not reference:
            self.before_steps_s = time.perf_counter() - self.started
        part = self.current or Part(new_mark_mib())
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        part.wall_s += time.perf_counter() - wall_s
        part.cpu_s += time.process_time() - cpu_s
        part.extra_mib = status_mib("VmHWM") - part.held_mib
        if reference:
            self.references.append(part)
        else:
            self.current = part

    def wrap(self, owner: Any, name: str, reference: bool = False) -> None:
        """Puts in the place of a function, or of a class's or an object's method, one that is timed."""
        function = getattr(owner, name)

        def timed_function(*args: Any, **options: Any) -> Any:
            with self.timed(reference):
                return function(*args, **options)

        setattr(owner, name, timed_function)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        self.ended = time.perf_counter()
        assert self.current is not None, "no part of this step was marked"
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.current.extra_mib -= sum(gradient.nbytes for gradient in gradients) / 2**20
        self.steps.append(self.current)
        self.current = None

    def found(self, warm_up: int) -> dict:
        assert len(self.references) in (0, len(self.steps)), "a reference forward for each step, or none"
        of_steps = itertools.zip_longest(self.steps, self.references, fillvalue=Part(0.0))
        timed = list(of_steps)[warm_up:]
        return {
            "step_ms": [round(1e3 * (step.wall_s + reference.wall_s), 2) for step, reference in timed],
            "step_cpu_ms": [round(1e3 * (step.cpu_s + reference.cpu_s), 2) for step, reference in timed],
            "before_steps_s": round(self.before_steps_s or 0.0, 2),
            "total_s": round(self.ended - self.started, 2),
            "peak_extra_mib": round(max(max(step.extra_mib, ref.extra_mib) for step, ref in timed), 1),
        }
