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

import rlhf_kernels as rk

from ..data.batches import IGNORED, Batch, collate_sequences, next_tokens
from ..data.encoding import Codec
from ..data.examples import Loaded, TokenSequence, load_conversations, reading_of
from ..models.checks import pad_id_of
from ..models.fused_lm import LMHead, load_policy, share_positions
from ..models.loading import load_codec_for, save_result
from ..models.sequence_parallel import SequenceParallel, start_sequence_parallel
from ..training.batch_plan import MicroBatch
from ..training.loop import plan_training, start_accelerator, train
from ..training.output_folder import begin
from ..training.task import LossOutput, Task
from .config import SFTConfig
from .packing import check_packing, collate_packed, plan_packing
from .tasks import check_examples_fit, load_tasks


def train_sft(config: SFTConfig) -> Path:
    """Trains; returns the folder that holds the model, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    accelerator = start_accelerator(config)
    if not begin(config, accelerator.is_main_process):
        return Path(config.output_dir)

    # Everything that can be wrong with the input shows here, before any training.
    codec, largest = load_codec_for(config)
    sequence = start_sequence_parallel(accelerator, config.sp_size)
    task, held_out = load_tasks(load_task, config, codec, accelerator)
    policy = load_policy(config, codec, largest)
    check_examples_fit(config, (task, held_out), policy.model, codec.tokenizer)
    if config.packing:
        check_packing(policy, "packing")
    share_positions(policy, sequence, "model_name_or_path")
    for data in (task, held_out):
        if data is not None:
            data.sequence = sequence
    return train(
        config, policy, task, held_out, accelerator,
        save=lambda trained, folder: save_result(trained.model, codec.tokenizer, folder, config),
    )  # fmt: skip


def load_task(
    config: SFTConfig,
    codec: Codec,
    source: str,
    split: str,
    accelerator: Accelerator,
    shuffled: bool,
) -> SFTTask:
    """Reads one data set, prints what became of its rows, and plans its batches."""
    data = read_conversations(config, codec, source, split)
    accelerator.print(data.report(source))
    return SFTTask(config, data.examples, pad_id_of(codec.tokenizer), accelerator, shuffled)


def read_conversations(config: SFTConfig, codec: Codec, source: str, split: str) -> Loaded[TokenSequence]:
    return load_conversations(
        source, codec, max_length=config.max_length, assistant_only_loss=config.assistant_only_loss,
        last_turn_only=config.last_turn_only, **reading_of(config, split),
    )  # fmt: skip


class SFTTask(Task):
    """Rows of one conversation each, or of several with packing, and their loss; means are over learned tokens.
    `train_sft` sets `sequence`: with whom this process shares sequences."""

    sequence: SequenceParallel | None = None

    def __init__(
        self, config: SFTConfig, sequences: list[TokenSequence], pad_id: int, accelerator: Accelerator, shuffled: bool
    ) -> None:
        lengths = [len(sequence.ids) for sequence in sequences]
        packed = plan_packing(lengths, config.max_length) if config.packing else [[i] for i in range(len(sequences))]
        self.rows_of_sequences = [[sequences[i] for i in row] for row in packed]
        widths = [sum(lengths[i] for i in row) for row in packed]
        sizes = [len(row) for row in packed]
        plan = plan_training(config, widths, accelerator, shuffled=shuffled, sizes=sizes, together=config.sp_size)
        counts = [sum(sum(sequence.counted[1:]) for sequence in row) for row in self.rows_of_sequences]
        super().__init__(plan, counts, accelerator.device, config.sp_size)
        self.packing, self.pad_id = config.packing, pad_id
        self.noun = "rows of packed conversations" if config.packing else "conversations"

    def batch(self, indices: MicroBatch) -> Batch:
        rows = [self.rows_of_sequences[i] for i in indices]
        if self.packing:
            return collate_packed(rows, self.pad_id).to(self.device)
        return collate_sequences([sequence for row in rows for sequence in row], self.pad_id).to(self.device)

    def examples(self, indices: MicroBatch) -> list[Any]:
        return [sequence for i in indices for sequence in self.rows_of_sequences[i]]

    def compute_loss(self, model: nn.Module, indices: MicroBatch) -> LossOutput:
        batch = self.batch(indices)
        targets = next_tokens(batch.labels)
        count = (targets != IGNORED).sum()
        if self.sequence is not None:
            targets = self.sequence.part(targets, IGNORED)
        loss, metrics = model(batch, lambda hidden, head: token_loss(hidden, head, targets, count))
        tokens = sum(len(sequence.ids) for sequence in self.examples(indices)) / self.together
        return LossOutput(loss, metrics, torch.tensor(float(tokens), device=self.device))


def token_loss(hidden: Tensor, head: LMHead, targets: Tensor, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of -log p over the learned tokens, in nats, and the metrics, means over the same tokens.

    hidden: [S, T, D]; targets: [S, T] int64, what each position predicts, IGNORED where nothing is learned; count: how
    many are learned, also by other processes that have another part of these sequences.
    """
    outputs = rk.linear_logprobs(hidden, head.weight, targets, **head.options(), outputs=("entropy", "is_top1"))
    loss = -outputs.logprobs.sum() / count
    return loss, {
        "loss": loss.detach(),
        "mean_token_accuracy": outputs.is_top1.sum() / count,
        "entropy": outputs.entropy.detach().sum() / count,
    }
