"""The trainers that benchmarks/steps/step.py runs: each a function of a Run that returns the loss of every step.

All of them start from the same weights and take the same tokens in the same batches, with AdamW, no weight decay, a
constant learning rate and gradients clipped to the same norm; gradient checkpointing, which TRL has on by default, is
off. What differs is how they come from hidden states to a loss, and all that they do besides.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.steps.step_parts import Parts


class CannotRun(Exception):
    """The message becomes the status of a row."""


@dataclass
class Run:
    """What a trainer is given: the same to each, and all of it."""

    model: str
    data: str
    folder: Path  # for whatever it writes
    batch: int
    learning_rate: float
    dtype: str
    parts: Parts | None = None  # where a step's parts are measured: TRL and the plain loop then hold a reference
    beta: float = 0.1
    max_grad_norm: float = 10.0
    fused_adamw: bool = True  # as that of `rlhf dpo` is
    max_length: int = 1024
    seed: int = 0


def trainer_of(name: str) -> Callable[[Run], list[float]]:
    """The trainer of that name, imported; CannotRun if it is not here."""
    if name.startswith("trl-"):
        return trl_trainer(name.removeprefix("trl-"))
    ours = {"rlhf": rlhf_trainer, "rlhf-share_prefix": partial(rlhf_trainer, share_prefix=True)}
    return (ours | {"plain": plain_loop})[name]()


def rlhf_trainer(share_prefix: bool = False) -> Callable[[Run], list[float]]:
    from accelerate import Accelerator

    from rlhf_trainer.offline import reference_logprobs as reference
    from rlhf_trainer.offline.config import DPOConfig
    from rlhf_trainer.offline.dpo import DPOTask, train_dpo

    def train(run: Run) -> list[float]:
        if run.parts:
            run.parts.wrap(reference, "sequence_logprobs", reference=True)
            run.parts.wrap(DPOTask, "measure")
            run.parts.wrap(Accelerator, "backward")
        folder = train_dpo(
            DPOConfig(
                model_name_or_path=run.model, dataset=run.data, output_dir=str(run.folder / "out"),
                ref_cache_dir=str(run.folder / "reference"),  # a new one: computed, not found
                beta=run.beta, batch_size=run.batch, micro_batch_size=run.batch, optimizer="adamw",
                learning_rate=run.learning_rate, warmup_steps=0, max_grad_norm=run.max_grad_norm,
                max_prompt_length=run.max_length - 1, max_length=run.max_length, seed=run.seed,
                precision="bf16" if run.dtype == "bfloat16" else "fp32", share_prefix=share_prefix,
            )
        )  # fmt: skip
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


def batches_of(run: Run) -> list[list[int]]:
    """The rows of each step, in the order in which `rlhf dpo` shuffles them."""
    from rlhf_trainer.training.batch_plan import plan_batches

    with open(run.data) as file:
        lengths = [0 for _ in file]  # of equal length to it, so that a batch stays in the file's order
    return [micro for batch in plan_batches(lengths, run.batch, run.batch, run.seed) for micro in batch]


def trl_trainer(version: str) -> Callable[[Run], list[float]]:
    try:
        import trl
    except ImportError as error:
        raise CannotRun(f"not installed: {error.name}") from error
    if trl.__version__ != version:
        raise CannotRun(f"not installed: trl {version}, here is {trl.__version__}")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def train(run: Run) -> list[float]:
        with open(run.data) as file:
            rows = [json.loads(line) for line in file]
        order = [i for batch in batches_of(run) for i in batch]
        config = DPOConfig(
            output_dir=str(run.folder), beta=run.beta, per_device_train_batch_size=run.batch, num_train_epochs=1,
            optim="adamw_torch_fused" if run.fused_adamw else "adamw_torch", learning_rate=run.learning_rate,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=run.max_grad_norm,
            max_length=run.max_length, seed=run.seed,
            train_sampling_strategy="sequential", precompute_ref_log_probs=run.parts is None,
            gradient_checkpointing=False,
            bf16=run.dtype == "bfloat16", model_init_kwargs={"dtype": "float32"}, use_cpu=True, logging_steps=1,
            save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = DPOTrainer(model=run.model, args=config, train_dataset=Dataset.from_list([rows[i] for i in order]))
        if run.parts:
            run.parts.wrap(trainer, "training_step")
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return train


def plain_loop() -> Callable[[Run], list[float]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_trainer.data.batches import Batch, collate
    from rlhf_trainer.data.examples import load_groups

    def train(run: Run) -> list[float]:
        tokenizer = AutoTokenizer.from_pretrained(run.model)
        lengths = {"max_prompt_length": run.max_length - 1, "max_length": run.max_length}
        pairs = load_groups(run.data, tokenizer, split="train", **lengths).examples
        batches = [collate([pairs[i] for i in rows], tokenizer.pad_token_id) for rows in batches_of(run)]
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0, fused=run.fused_adamw)

        def logps(batch: Batch, model: torch.nn.Module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bfloat16"):
                logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
            targets = batch.labels[:, 1:]
            picked = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            return torch.where(targets == -100, 0.0, picked).sum(-1)

        @torch.no_grad()
        def reference_logps(batch: Batch) -> Tensor:
            return logps(batch, reference)

        reference, references, losses = model, {}, []
        if run.parts:
            reference = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
        else:
            references = {k: reference_logps(batch) for k, batch in enumerate(batches)}
        for k, batch in enumerate(batches):
            with run.parts.timed() if run.parts else contextlib.nullcontext():
                ref_logps = references[k] if references else reference_logps(batch)
                chosen, rejected = (logps(batch, model) - ref_logps).chunk(2)
                loss = -torch.nn.functional.logsigmoid(run.beta * (chosen - rejected)).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return train
