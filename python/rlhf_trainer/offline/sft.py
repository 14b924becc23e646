"""Supervised fine-tuning: next-token prediction on conversations, where only the assistant's tokens are learned.

The loss is that of InstructGPT (Ouyang et al., 2022, arXiv:2203.02155) and of every instruction tuning since: the mean
of -log pi(token | all before it) over the learned tokens of the whole batch, however it is split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import rlhf_kernels as rk

from ..config.base import SFTConfig
from ..data.chat import set_chat_template
from ..data.examples import IGNORED, Batch, Sequence, collate_sequences, load_conversations
from ..errors import UsageError
from ..models.loading import (
    FusedLM,
    LMHead,
    check_fit,
    check_vocabulary,
    checkpoint_gradients,
    end_where_tokenizer_does,
    largest_id,
    load_causal_lm,
    load_tokenizer_for,
    make_room,
    pad_id_of,
)
from ..training.batch_plan import MicroBatch
from ..training.loop import Measured, Task, begin, plan_of, train
from ..training.output_folder import save_model
from .packing import collate_packed, leaks, plan_packing


class SFTTask(Task):
    """Rows of one conversation each, or of several with packing; means are over learned tokens."""

    names = ("loss", "token_accuracy", "entropy")

    def __init__(
        self, config: SFTConfig, sequences: list[Sequence], pad_id: int, accelerator: Accelerator, shuffled: bool
    ) -> None:
        lengths = [len(sequence.ids) for sequence in sequences]
        packed = plan_packing(lengths, config.max_length) if config.packing else [[i] for i in range(len(sequences))]
        self.rows_of_sequences = [[sequences[i] for i in row] for row in packed]
        widths = [sum(lengths[i] for i in row) for row in packed]
        sizes = [len(row) for row in packed]
        plan = plan_of(config, widths, accelerator, shuffled=shuffled, sizes=sizes)
        counts = [sum(sum(sequence.counted[1:]) for sequence in row) for row in self.rows_of_sequences]
        super().__init__(plan, counts, accelerator.device)
        self.packing, self.pad_id = config.packing, pad_id
        self.noun = "rows of packed conversations" if config.packing else "conversations"

    def batch(self, indices: MicroBatch) -> Batch:
        rows = [self.rows_of_sequences[i] for i in indices]
        if self.packing:
            return collate_packed(rows, self.pad_id).to(self.device)
        return collate_sequences([sequence for row in rows for sequence in row], self.pad_id).to(self.device)

    def examples(self, indices: MicroBatch) -> list[Any]:
        return [sequence for i in indices for sequence in self.rows_of_sequences[i]]

    def measure(self, model: nn.Module, indices: MicroBatch) -> Measured:
        batch = self.batch(indices)
        loss, metrics = model(batch, lambda hidden, head: token_loss(hidden, head, batch.labels))
        tokens = sum(len(sequence.ids) for sequence in self.examples(indices))
        return Measured(loss, metrics, torch.tensor(float(tokens), device=self.device))


def token_loss(hidden: Tensor, head: LMHead, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [S, T, D], labels [S, T] -> the mean of -log p over the learned tokens, in nats, and SFTTask.names [3]."""
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
    found = rk.linear_logprobs(hidden, head.weight, targets, **head.options(), outputs=("entropy", "is_top1"))
    count = (targets != IGNORED).sum()
    loss = -found.logprobs.sum() / count
    means = [loss.detach(), found.is_top1.sum() / count, found.entropy.detach().sum() / count]
    return loss, torch.stack([mean.float() for mean in means])


def train_sft(config: SFTConfig) -> Path:
    """Trains; returns the folder that holds the model, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    accelerator, finished = begin(config)
    if finished:
        return Path(config.output_dir)

    # Everything that can be wrong with the input shows here, before any training.
    tokenizer = load_tokenizer_for(config)
    largest = largest_id(tokenizer)
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    task = load_task(config, tokenizer, config.dataset, config.dataset_split, accelerator, shuffled=True)
    held_out = None
    if config.eval_dataset is not None:
        held_out = load_task(config, tokenizer, config.eval_dataset, config.eval_split, accelerator, shuffled=False)
    model = load_causal_lm(
        config.model_name_or_path, key="model_name_or_path", attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    check_vocabulary(model, largest)  # before room is made for what a template brings
    if config.chat_template is not None:
        make_room(model, tokenizer)
        end_where_tokenizer_does(model, tokenizer)
    for data, source in ((task, config.dataset), (held_out, config.eval_dataset)):
        if data is not None:
            sequences = data.examples(range(len(data.counts)))
            check_fit(model, tokenizer, [s.row for s in sequences], [len(s.ids) for s in sequences], str(source))
    if config.packing and leaks(model):
        raise UsageError(
            f"packing: in {type(model).__name__} with attention {model.config._attn_implementation!r} conversations "
            "that share a row see each other. Leave packing off, or try attn_implementation: sdpa"
        )
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    fused = FusedLM(model, bf16=config.precision == "bf16")
    return train(
        config, fused, task, held_out, accelerator,
        save=lambda trained, folder: save_model(trained.model, tokenizer, folder),
    )  # fmt: skip


def load_task(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: str,
    accelerator: Accelerator,
    shuffled: bool,
) -> SFTTask:
    """Reads, reports and plans one data set."""
    data = load_conversations(
        source, tokenizer, split=split, format=config.dataset_format, streaming=config.streaming,
        max_length=config.max_length, turns=config.assistant_turns, skip_invalid_rows=config.skip_invalid_rows,
    )  # fmt: skip
    accelerator.print(data.report(source))
    return SFTTask(config, data.examples, pad_id_of(tokenizer), accelerator, shuffled)
