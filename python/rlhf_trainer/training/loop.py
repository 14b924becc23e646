"""The loop that every command trains by: accumulate, clip, check, step, log, evaluate, save, resume.

A command defines its examples and their loss (`Task`); the rest is the same for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils import clip_grad_norm_

import rlhf_kernels as rk

from ..config.base import TrainConfig
from ..data.batches import Batch
from ..errors import TrainingError, UsageError
from .batch_plan import MicroBatch, plan_batches, step_plan
from .best import Best
from .checkpoint import (
    FOLDER,
    Background,
    Checkpoint,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
)
from .fsdp import gather, local, place, saved_dtype, sharding, whole
from .memory import give_back_freed_memory, lack_of_memory
from .metrics import MetricsLog, make_accelerator
from .optimizers import learning_rate_at, make_optimizer
from .output_folder import commit_output, keep_checkpoints, open_output, partial_folder
from .publishing import check_hub, push, write_card
from .task import Metrics, Task, Totals, with_aux_loss

BEST = f"{FOLDER}/best"  # of the best evaluation's weights; kept as checkpoints are, for a run that is made longer
BAD_BATCH = "bad_batch.json"
LOWER_RATE = "Lower learning_rate or max_grad_norm, or lengthen warmup_steps."


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Devices and processes, as the launcher set them up, with the run's seed and workspace budget."""
    check_hub(config)
    accelerator = make_accelerator(config.report_to, partial_folder(config.output_dir))
    rk.set_workspace_budget(config.workspace_mib)
    torch.manual_seed(config.seed)  # training itself draws nothing from it; a model's own code may
    return accelerator


def plan_training(
    config: TrainConfig,
    lengths: Sequence[int],
    accelerator: Accelerator,
    *,
    shuffled: bool,
    sizes: Sequence[int] | None = None,
    together: int = 1,
) -> list[list[MicroBatch]]:
    """The run's batches; micro-batches, each of `together` processes, are smaller where processes would otherwise have
    nothing to do."""
    micro = min(config.micro_batch_size, math.ceil(config.batch_size * together / accelerator.num_processes))
    return plan_batches(lengths, config.batch_size, micro, config.seed if shuffled else None, sizes)


class Run:
    """A training run into output_dir: the model and its optimizer, the folder it works in, its log, its checkpoints.

    `total`: the number of steps. `data`: a checksum of the data, which must be the same when a run is resumed.
    A resumed run goes on after `done` steps; `state` is what its checkpoint holds beside weights and optimizer.
    """

    def __init__(
        self, config: TrainConfig, module: nn.Module, accelerator: Accelerator, total: int, data: Callable[[], str]
    ) -> None:
        self.config, self.accelerator, self.total = config, accelerator, total
        give_back_freed_memory(module)
        if sharding():
            self.model = place(module, accelerator, bf16=config.bf16, dtype=config.trained_dtype)
            self.optimizer = make_optimizer(config, module)
        else:
            self.model, self.optimizer = accelerator.prepare(module, make_optimizer(config, module))
        self.balanced = [part for part in module.modules() if getattr(part, "aux_coefficient", 0)]
        self.dropouts = [part for part in module.modules() if getattr(part, "drops_in_updates", False)]
        self.drawn_for = 0  # the step for which draws of dropout were seeded
        self.shape = "before the model's first call"
        self.model.register_forward_pre_hook(self.keep_shape)
        if accelerator.is_main_process:
            open_output(config, total)
        accelerator.wait_for_everyone()
        self.work = partial_folder(config.output_dir)
        checkpoint = newest_checkpoint(self.work)
        self.data = data()
        if checkpoint is not None:
            check_same_data(checkpoint, self.data)
            load_checkpoint(checkpoint, self.unwrapped, self.optimizer)
        self.done, self.state = (checkpoint.step, checkpoint.state) if checkpoint else (0, {"metrics_bytes": 0})
        self.best = Best(config, self.state.get("best"))
        self.background = Background() if config.async_save else None
        settings = dataclasses.asdict(config)
        kept_bytes = self.state["metrics_bytes"]
        self.log = MetricsLog(self.work, accelerator, total, config.project, settings, self.done, kept_bytes)
        if self.done:
            self.log.write(f"resumed from step {self.done}")
            then = self.state.get("total", total)
            if then != total and any(
                learning_rate_at(config, step, then) != learning_rate_at(config, step, total)
                for step in range(1, self.done + 1)
            ):
                self.log.write(
                    f"note: the learning rate was that of a run of {then} steps until here, and is now that of a run "
                    f"of {total}, on which lr_scheduler_type and warmup_steps depend"
                )

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.background is not None and kind is None:
                self.background.wait()
        finally:
            self.log.close()

    def keep_shape(self, _model: nn.Module, inputs: tuple[Batch, ...]) -> None:
        """For the message where memory is lacking."""
        rows, tokens = inputs[0].input_ids.shape
        self.shape = f"a micro-batch of {rows} x {tokens} tokens"

    def update(self, task: Task, batch: list[MicroBatch], step: int) -> tuple[Metrics, float]:
        """One optimizer step on `batch`; `step` sets the learning rate. Returns metrics, and the number of tokens."""
        accelerator = self.accelerator
        learning_rate = learning_rate_at(self.config, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        totals, shares = Totals(), task.shares(batch, accelerator)
        self.turn_dropout(True, step)
        for i, share in enumerate(shares):
            # Gradients travel between processes once a step, with the last micro-batch.
            is_last = i == len(shares) - 1
            syncs = contextlib.nullcontext() if is_last else accelerator.no_sync(self.model)
            # Where there is no gradient, there is no backward pass; but for the last, as all weights need one, be it 0.
            teaches = is_last or bool(self.balanced or sharding()) or not task.idle.issuperset(share.indices)
            with syncs, lack_of_memory(self.config, lambda: f"step {step}, {self.shape}"):
                with torch.set_grad_enabled(teaches):
                    output = with_aux_loss(task.compute_loss(self.model, share.indices), self.balanced)
                if teaches:
                    # The weights of all shares sum to 1, and DDP takes the mean over processes: undo its division.
                    accelerator.backward(output.loss * (share.weight * accelerator.num_processes))
            totals.add(output, share.weight)
        self.turn_dropout(False, step)

        grad_norm = clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        metrics, tokens = totals.reduce(accelerator)
        metrics["grad_norm"] = whole(grad_norm).item()
        if not all(math.isfinite(value) for value in metrics.values()):
            raise TrainingError(dump_bad_batch(step, metrics, task, batch, self.work, accelerator))
        with lack_of_memory(self.config, lambda: f"step {step}, the optimizer's update"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"learning_rate": learning_rate}, tokens

    def turn_dropout(self, on: bool, step: int) -> None:
        """That of adapters, which is off in all other passes; its draws depend on seed, step and process alone."""
        for dropout in self.dropouts:
            dropout.training = on
        if self.dropouts and on and step != self.drawn_for:
            seed = f"{self.config.seed}, step {step}, process {self.accelerator.process_index}"
            torch.manual_seed(random.Random(seed).getrandbits(63))
            self.drawn_for = step

    def judge(self, step: int, metrics: Metrics) -> None:
        """Keeps the weights of the best evaluation, if they are wanted. Call it before the step's checkpoint."""
        if self.best.takes(step, metrics) and self.config.load_best_model_at_end:
            save_weights(self.work / BEST, self.unwrapped)

    def restore_best(self) -> bool:
        """Goes back to the weights of the best evaluation, if they are wanted and others than the last."""
        if self.best.is_over:
            self.log.write(f"stopped early: nothing has been better than step {self.best.step}")
        wanted = self.config.load_best_model_at_end and self.best.step is not None
        if wanted:
            self.log.write(f"the result is that of step {self.best.step}, whose evaluation is the best")
            load_weights(self.work / BEST, self.unwrapped)
        return wanted

    def save_checkpoint(self, step: int, **state: Any) -> None:
        """Saves a checkpoint, with `state` in it, every save_steps steps, and unless save_only_model after the last."""
        if step % self.config.save_steps == 0 if step < self.total else not self.config.save_only_model:
            state |= {"metrics_bytes": self.log.bytes_written(), "data": self.data, "total": self.total}
            state["best"] = self.best.state
            save_checkpoint(self.work, step, self.unwrapped, self.optimizer, state, self.background)

    def finish(self, save: Callable[[nn.Module, Path], None]) -> Path:
        """`save(module, folder)` writes the result. Returns output_dir, whole once it is there."""
        self.accelerator.wait_for_everyone()
        broken = [name for name, weight in self.model.named_parameters() if not local(weight).isfinite().all()]
        if broken := gather_object(broken):
            raise TrainingError(
                f"step {self.total}: the last update left weights that are not finite: {broken[0]}, ... {LOWER_RATE}"
            )
        gather(self.model, self.accelerator, None if self.config.use_peft else saved_dtype(self.model, self.config))
        if self.accelerator.is_main_process:
            save(self.unwrapped, self.work)
            write_card(self.config, self.work)
            folder = commit_output(self.config)
            keep_checkpoints(self.config)  # last: until then the run can be resumed
            print(f"saved to {self.config.output_dir}")
            if self.config.push_to_hub:
                print(push(self.config, folder))
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
        run.log.write(f"{len(task.counts)} {task.noun}, {len(steps)} steps, metrics in {run.work / 'metrics.jsonl'}")
        if held_out is not None and run.done in (0, len(steps)):  # at the end, too: `save` may need the task evaluated
            metrics = evaluate(held_out, run.model, accelerator)
            if not run.done:
                run.log.log(0, 0.0, metrics)
        for step, index in enumerate(steps[run.done :], start=run.done + 1):
            if run.best.is_over:
                break
            started = time.perf_counter()
            metrics, tokens = run.update(task, task.plan[index], step)
            shown = (*list(metrics)[:2], "learning_rate", "tokens_per_second")
            metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
            if held_out is not None and (step == len(steps) or step % (config.eval_steps or len(steps)) == 0):
                metrics |= evaluate(held_out, run.model, accelerator)
            run.log.log(step, step / len(task.plan), metrics, shown)
            run.judge(step, metrics)
            run.save_checkpoint(step)
        if run.restore_best() and held_out is not None:
            evaluate(held_out, run.model, accelerator)  # `save` may report it
    return run.finish(save)


def evaluate(task: Task, model: nn.Module, accelerator: Accelerator) -> Metrics:
    return {f"eval/{name}": value for name, value in task.evaluate(model, accelerator).items()}


def fingerprint(task: Task) -> str:
    """A checksum of the examples and their order: a run may be resumed only with the data that it began with."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(task.plan).encode() + task.depends_on())
    for batch in task.plan:
        for micro in batch:
            digest.update(repr(task.examples(micro)).encode())
    return digest.hexdigest()


def check_same_data(checkpoint: Checkpoint, data: str) -> None:
    if checkpoint.state["data"] != data:
        raise UsageError(
            f"{checkpoint.folder}: the data set, the tokenizer, a reference model or, where a batch has fewer "
            "micro-batches than processes, their number is not that which the run began with, so "
            "--resume_from_checkpoint cannot go on with it"
        )


def dump_bad_batch(
    step: int, metrics: dict[str, float], task: Task, batch: list[MicroBatch], work: Path, accelerator: Accelerator
) -> str:
    """Saves the batch for inspection; returns the message."""
    examples = task.examples([i for micro in batch for i in micro])
    if accelerator.is_main_process:
        content = {"step": step, "metrics": metrics, "examples": [example._asdict() for example in examples]}
        (work / BAD_BATCH).write_text(json.dumps(content), encoding="utf-8")
    rows = sorted({example.row for example in examples})
    return (
        f"step {step}: stopped before the update, {metrics}; rows {rows}, saved with their tokens in "
        f"{work / BAD_BATCH}. Look at these rows; if they are as they should be: {LOWER_RATE}"
    )
