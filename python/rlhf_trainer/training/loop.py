"""The loop that every stage trains by: accumulate, clip, check, step, log, evaluate, save, go on where it stopped.

A stage says what its examples are and what their loss is (`Task`); the rest is the same for all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import rlhf_kernels as rk

from ..config.base import TrainConfig
from ..config.parse import dump_yaml
from ..errors import UsageError
from .batch_plan import MicroBatch, plan_batches, share_of_process, step_plan
from .checkpoint import Saved, load_state, newest_state, remove_state, save_state
from .metrics import MetricsLog, make_accelerator
from .output_folder import check_free, commit_output, is_finished, open_output, partial_folder

BAD_BATCH = "bad_batch.json"
LOWER_RATE = "Lower learning_rate or max_grad_norm, or lengthen warmup_steps."
M_MMAP_THRESHOLD = -3  # of malloc.h
MAPPED_BYTES = 1 << 20  # smaller tensors are not worth a call of the system each
LARGE_BYTES = 64 << 20


class Measured(NamedTuple):
    """What a micro-batch gives: its mean loss, and its share of the metrics."""

    loss: Tensor  # scalar, with gradient
    metrics: Tensor  # [len(Task.names)], without: means over what the task counts; extremes where names end so
    tokens: Tensor  # scalar: how many went through the model


class Task(ABC):
    """Examples of one stage, their plan, and their loss. `counts` [N] is what means are over: pairs, tokens."""

    names: tuple[str, ...]  # of the metrics; ".../min" and ".../max" are extremes over the batch
    noun = "prompts with pairs"  # what its examples are

    def __init__(self, plan: list[list[MicroBatch]], counts: Sequence[float], device: torch.device) -> None:
        self.plan, self.counts, self.device = plan, counts, device

    @abstractmethod
    def measure(self, model: nn.Module, indices: MicroBatch) -> Measured:
        """The loss of these examples under `model`, which may be wrapped."""

    @abstractmethod
    def examples(self, indices: MicroBatch) -> list[Any]:
        """NamedTuples with `row`, for a person who looks for what is wrong with them."""

    def depends_on(self) -> bytes:
        """What the loss depends on beside the examples and the model."""
        return b""

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The metrics over all examples."""
        return means_over(self, model, accelerator)


class Totals:
    """Sums up shares of a batch, over micro-batches and processes."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device)
        self.least = torch.full((len(names),), math.inf, device=device)
        self.most = -self.least

    def add(self, measured: Measured, weight: float) -> None:
        if weight == 0:  # a repeated micro-batch, there to keep the processes in step
            return
        metrics = measured.metrics.float()
        self.sums += torch.cat([metrics * weight, measured.tokens[None].float()])
        self.least = torch.minimum(self.least, metrics)
        self.most = torch.maximum(self.most, metrics)

    def reduce(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The metrics by name, and the number of tokens."""
        *means, tokens = accelerator.reduce(self.sums, "sum").tolist()
        least, most = (accelerator.gather(extreme[None]) for extreme in (self.least, self.most))
        found = dict(zip(self.names, means, strict=True))
        for i, name in enumerate(self.names):
            if name.endswith("/min"):
                found[name] = least[:, i].min().item()
            elif name.endswith("/max"):
                found[name] = most[:, i].max().item()
        return found, tokens


@torch.no_grad()
def means_over(task: Task, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    """`task.names` over all examples."""
    totals, everything = Totals(task.names, task.device), sum(task.counts)
    for batch in task.plan:
        part = sum(task.counts[i] for micro in batch for i in micro) / everything
        for share in share_of_process(batch, accelerator.process_index, accelerator.num_processes, task.counts):
            totals.add(task.measure(model, share.indices), part * share.weight)
    return totals.reduce(accelerator)[0]


def begin(config: TrainConfig) -> tuple[Accelerator, bool]:
    """Devices and processes, and whether the run is done already; raises UsageError where output_dir is not free."""
    accelerator = make_accelerator(config.report_to, partial_folder(config.output_dir))
    rk.set_workspace_budget(config.workspace_mib)
    torch.manual_seed(config.seed)  # training itself draws nothing from it; a model's own code may
    if config.resume and is_finished(config.output_dir, dump_yaml(config), config.overwrite):
        remove_state(Path(config.output_dir))
        accelerator.print(f"{config.output_dir} is finished; nothing is left to do")
        return accelerator, True
    if accelerator.is_main_process:
        check_free(config.output_dir, config.overwrite, config.resume)
    return accelerator, False


def give_back_freed_memory(model: nn.Module) -> None:
    """Has glibc return freed tensors to the system at once. By itself it comes to keep what was freed of up to 32 MiB:
    a step's activations, which are then still held when the largest gradients arrive. Where gradients are small that
    is no matter, and fetching memory anew for each tensor would take longer than to compute it."""
    largest = max(weight.nbytes for weight in model.parameters())
    allocator = ctypes.CDLL(None) if sys.platform == "linux" else None
    if largest >= LARGE_BYTES and hasattr(allocator, "mallopt"):
        allocator.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def plan_of(
    config: TrainConfig,
    lengths: Sequence[int],
    accelerator: Accelerator,
    *,
    shuffled: bool,
    sizes: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """Micro-batches are made smaller where processes would otherwise have nothing to do."""
    micro = min(config.micro_batch_size, math.ceil(config.batch_size / accelerator.num_processes))
    return plan_batches(lengths, config.batch_size, micro, config.seed if shuffled else None, sizes)


class Run:
    """A training run into output_dir: the model and its optimizer, the folder it works in, its log and its states.

    `total`: how many steps it logs. `data`: tells what it trains on, as a run may go on only with what it began with.
    A run that was stopped continues after `done` steps; `facts` is what it kept then.
    """

    def __init__(
        self, config: TrainConfig, module: nn.Module, accelerator: Accelerator, total: int, data: Callable[[], str]
    ) -> None:
        self.config, self.accelerator, self.total = config, accelerator, total
        give_back_freed_memory(module)
        self.model, self.optimizer = accelerator.prepare(module, make_optimizer(config, module))
        if accelerator.is_main_process:
            open_output(config.output_dir, config.overwrite, dump_yaml(config), config.resume)
        accelerator.wait_for_everyone()
        self.work = partial_folder(config.output_dir)
        saved = newest_state(self.work)
        self.data = data() if saved is not None or total > config.save_steps else ""
        if saved is not None:
            check_same_data(saved, self.data)
            load_state(saved, self.unwrapped, self.optimizer)
        self.done, self.facts = (saved.step, saved.facts) if saved else (0, {"metrics_bytes": 0})
        settings = dataclasses.asdict(config)
        kept_bytes = self.facts["metrics_bytes"]
        self.log = MetricsLog(self.work, accelerator, total, config.run_name, settings, self.done, kept_bytes)
        if self.done:
            self.log.say(f"goes on after step {self.done}")
        if total < config.warmup_steps:
            self.log.say(
                f"note: the warm-up takes {config.warmup_steps} steps, so the learning rate stays below its peak"
            )

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.log.close()

    def update(self, task: Task, batch: list[MicroBatch], step: int) -> tuple[dict[str, float], float]:
        """One optimizer step on `batch`; `step` sets the learning rate. Returns metrics, and the number of tokens."""
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        learning_rate = learning_rate_at(self.config, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        totals = Totals(task.names, accelerator.device)
        shares = share_of_process(batch, rank, world, task.counts)
        for i, share in enumerate(shares):
            # Gradients travel between processes once a step, with the last micro-batch.
            with contextlib.nullcontext() if i == len(shares) - 1 else accelerator.no_sync(self.model):
                measured = task.measure(self.model, share.indices)
                # The weights of all shares sum to 1, and DDP takes the mean over processes: undo its division.
                accelerator.backward(measured.loss * (share.weight * world))
            totals.add(measured, share.weight)

        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        metrics, tokens = totals.reduce(accelerator)
        metrics["grad_norm"] = float(grad_norm)
        if not all(math.isfinite(value) for value in metrics.values()):
            raise UsageError(told_of_bad_batch(step, metrics, task, batch, self.work, accelerator))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"learning_rate": learning_rate}, tokens

    def keep(self, step: int, **facts: float) -> None:
        """What --resume needs to go on after `step`, every save_steps steps; after the last one, the result is kept."""
        if step % self.config.save_steps == 0 and step < self.total:
            if self.accelerator.is_main_process:
                known = {"metrics_bytes": self.log.bytes_written(), "data": self.data}
                save_state(self.work, step, self.unwrapped, self.optimizer, known | facts)
            self.accelerator.wait_for_everyone()

    def finish(self, save: Callable[[nn.Module, Path], None]) -> Path:
        """`save(module, folder)` writes the result. Returns output_dir, whole once it is there."""
        self.accelerator.wait_for_everyone()
        broken = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise UsageError(
                f"step {self.total}: the last update left weights that are not finite: {broken[0]}, ... {LOWER_RATE}"
            )
        if self.accelerator.is_main_process:
            save(self.unwrapped, self.work)
            remove_state(commit_output(self.config.output_dir, self.config.overwrite))  # last: until then it can go on
            print(f"saved to {self.config.output_dir}")
        self.accelerator.wait_for_everyone()
        return Path(self.config.output_dir)


def train(
    config: TrainConfig,
    module: nn.Module,
    task: Task,
    held_out: Task | None,
    accelerator: Accelerator,
    save: Callable[[nn.Module, Path], None],
) -> Path:
    """Trains `module` on the task's plan; `save(module, folder)` writes the result. Returns output_dir."""
    steps = step_plan(len(task.plan), config.num_train_epochs, config.max_steps, config.seed)
    with Run(config, module, accelerator, len(steps), lambda: fingerprint(task)) as run:
        run.log.say(f"{len(task.counts)} {task.noun}, {len(steps)} steps, metrics in {run.work / 'metrics.jsonl'}")
        if held_out is not None and not run.done:
            run.log.log(0, 0.0, evaluate(held_out, run.model, accelerator))
        for step, index in enumerate(steps[run.done :], start=run.done + 1):
            started = time.perf_counter()
            metrics, tokens = run.update(task, task.plan[index], step)
            metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
            if held_out is not None and (step == len(steps) or step % (config.eval_steps or len(steps)) == 0):
                metrics |= evaluate(held_out, run.model, accelerator)
            run.log.log(step, step / len(task.plan), metrics)
            run.log.advance(**{name: f"{metrics[name]:.4f}" for name in task.names[:2]})
            run.keep(step)
    return run.finish(save)


def evaluate(task: Task, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in task.evaluate(model, accelerator).items()}


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """Of step 1, 2, ..., steps: a linear warm-up to the peak, from there constant or down to 0 behind the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * shapes[config.lr_schedule]


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), **settings)
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)  # no temporaries as large as the head


def fingerprint(task: Task) -> str:
    """Of the examples and their order: a run may go on only with the data it began with."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(task.plan).encode() + task.depends_on())
    for batch in task.plan:
        for micro in batch:
            digest.update(repr(task.examples(micro)).encode())
    return digest.hexdigest()


def check_same_data(saved: Saved, data: str) -> None:
    if saved.facts["data"] != data:
        raise UsageError(
            f"{saved.folder}: the data set, the tokenizer, a reference model or the number of processes is not what "
            "the run began with, so --resume cannot go on with it"
        )


def told_of_bad_batch(
    step: int, metrics: dict[str, float], task: Task, batch: list[MicroBatch], work: Path, accelerator: Accelerator
) -> str:
    """Saves the batch for inspection; returns what to tell."""
    examples = task.examples([i for micro in batch for i in micro])
    if accelerator.is_main_process:
        content = {"step": step, "metrics": metrics, "examples": [example._asdict() for example in examples]}
        (work / BAD_BATCH).write_text(json.dumps(content), encoding="utf-8")
    rows = sorted({example.row for example in examples})
    return (
        f"step {step}: stopped before the update, {metrics}; rows {rows}, saved with their tokens in "
        f"{work / BAD_BATCH}. Look at these rows; if they are as they should be: {LOWER_RATE}"
    )
