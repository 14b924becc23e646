"""The trainers that take turns: each a function of a Run that returns the loss of every step.

All of them start from the same weights and take the same tokens in the same batches, with AdamW, no weight decay, a
constant learning rate and gradients clipped to the same norm; gradient checkpointing, which TRL has on by default, is
off, and the reference's log-probs are computed once, before training. What differs is how they come from hidden states
to a loss, and all that they do besides.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass
class Run:
    """The inputs of every trainer, the same for each."""

    model: str
    data: str
    folder: Path  # for whatever it writes
    batch: int
    learning_rate: float
    dtype: str  # bfloat16: by autocast
    beta: float = 0.1
    max_grad_norm: float = 10.0
    max_length: int = 1024
    seed: int = 0
    lora: bool = False  # an adapter on all linear layers, in the place of the weights


Trainer = Callable[[Run], list[float]]


def rlhf_trainer(**layout: bool) -> Trainer:
    from rlhf_trainer.offline.config import DPOConfig
    from rlhf_trainer.offline.dpo import train_dpo

    def train(run: Run) -> list[float]:
        folder = train_dpo(
            DPOConfig(
                model_name_or_path=run.model, dataset_name=run.data, output_dir=str(run.folder / "out"),
                ref_cache_dir=str(run.folder / "reference"),  # a new one: computed, not found
                beta=run.beta, batch_size=run.batch, micro_batch_size=run.batch, optim="adamw_torch_fused",
                learning_rate=run.learning_rate, warmup_steps=0, max_grad_norm=run.max_grad_norm,
                max_prompt_length=run.max_length - 1, max_length=run.max_length, seed=run.seed,
                bf16=run.dtype == "bfloat16", **layout,
                use_peft=run.lora, lora_target_modules=["all-linear"] if run.lora else [], lora_dropout=0.0,
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


def trl_trainer(fuse: bool = False) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from rlhf_kernels.integrations.trl import fused

    def train(run: Run) -> list[float]:
        with open(run.data) as file:
            rows = [json.loads(line) for line in file]
        dtype = "bfloat16" if run.lora else "float32"
        order = [i for batch in batches_of(run) for i in batch]
        config = DPOConfig(
            output_dir=str(run.folder), beta=run.beta, per_device_train_batch_size=run.batch, num_train_epochs=1,
            optim="adamw_torch_fused", learning_rate=run.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, max_grad_norm=run.max_grad_norm, max_length=run.max_length, seed=run.seed,
            train_sampling_strategy="sequential", precompute_ref_log_probs=True, gradient_checkpointing=False,
            bf16=run.dtype == "bfloat16", model_init_kwargs={"dtype": dtype}, use_cpu=True, logging_steps=1,
            save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer_type, data = fused(DPOTrainer) if fuse else DPOTrainer, Dataset.from_list([rows[i] for i in order])
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        trainer = trainer_type(model=run.model, args=config, train_dataset=data, peft_config=lora if run.lora else None)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return train


# By name, a function that imports what the trainer needs.
TRAINERS: dict[str, Callable[[], Trainer]] = {
    "rlhf": rlhf_trainer,
    "rlhf, share_prefix": partial(rlhf_trainer, share_prefix=True),
    "rlhf, padding_free": partial(rlhf_trainer, padding_free=True),
    "TRL": trl_trainer,
    "TRL, fused": partial(trl_trainer, fuse=True),
}
