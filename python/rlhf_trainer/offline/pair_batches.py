"""Preferences for training: the responses to one prompt, each computed once, and the pairs that compare them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.batches import Batch, pad_sequences
from ..data.encoding import Codec
from ..data.examples import Group, Loaded, TokenSequence, load_groups, reading_of
from ..training.batch_plan import MicroBatch
from ..training.loop import plan_training
from ..training.task import Task
from .config import PairConfig
from .packing import collate_packed


class PairBatch(NamedTuple):
    """G groups: their S responses as sequences, and the P pairs among all of them."""

    batch: Batch
    labels: Tensor  # [S, T'] int64, or [T] with cu_seqlens, as `hidden_of` lays hidden states out
    chosen_idxs: Tensor  # [P] int64 into [0, S)
    rejected_idxs: Tensor  # [P]
    margins: Tensor  # [P] fp32
    gather: Tensor | None = None  # [S, T'] positions in the flattened batch, where rows hold more than one sequence
    cu_seqlens: Tensor | None = None  # [S + 1] where sequences begin in the only row, and the last one ends

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(*(part if part is None else part.to(device) for part in self))

    def hidden_of(self, hidden: Tensor) -> Tensor:
        """The model's hidden states of the batch -> [S, T', D], a row for each response, or [T, D] with cu_seqlens."""
        if self.cu_seqlens is not None:
            return hidden.flatten(0, 1)
        return hidden if self.gather is None else hidden.flatten(0, 1)[self.gather]


def collate_groups(groups: list[Group], pad_id: int) -> PairBatch:
    """A row for each response: its prompt, then itself."""
    batch = pad_sequences([(group.prompt, response) for group in groups for response in group.responses], pad_id)
    return PairBatch(batch, batch.labels, *pairs_of(groups))


def collate_flat(groups: list[Group], pad_id: int) -> PairBatch:
    """All responses, each behind its prompt, in one row without padding."""
    sequences = [
        TokenSequence(group.row, group.prompt + response, [False] * len(group.prompt) + [True] * len(response))
        for group in groups
        for response in group.responses
    ]
    batch = collate_packed([sequences], pad_id)
    ends = torch.tensor([0, *(len(sequence.ids) for sequence in sequences)]).cumsum(0)
    return PairBatch(batch, batch.labels[0], *pairs_of(groups), cu_seqlens=ends)


def pairs_of(groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """chosen_idxs, rejected_idxs, margins [P] among the responses of all groups, in their order."""
    chosen, rejected, first = [], [], 0
    for group in groups:
        chosen += [first + better for better, _ in group.pairs]
        rejected += [first + worse for _, worse in group.pairs]
        first += len(group.responses)
    margins = torch.tensor([margin for group in groups for margin in group.margins], dtype=torch.float32)
    return torch.tensor(chosen), torch.tensor(rejected), margins


def read_groups(
    config: PairConfig, codec: Codec, source: str, split: str, *, keep_rendering: bool = False
) -> Loaded[Group]:
    return load_groups(
        source, codec, max_prompt_length=config.max_prompt_length, max_length=config.max_length,
        keep_rendering=keep_rendering, **reading_of(config, split),
    )  # fmt: skip


class GroupTask(Task):
    """A task whose examples are groups; means are over their pairs."""

    def __init__(
        self, config: PairConfig, groups: list[Group], pad_id: int, accelerator: Accelerator, shuffled: bool
    ) -> None:
        sizes = [len(group.pairs) for group in groups]
        lengths, together = [group.length for group in groups], getattr(config, "sp_size", 1)
        plan = plan_training(config, lengths, accelerator, shuffled=shuffled, sizes=sizes, together=together)
        super().__init__(plan, sizes, accelerator.device, together)
        self.config, self.groups, self.pad_id = config, groups, pad_id

    def examples(self, indices: MicroBatch) -> list[Group]:
        return [self.groups[i] for i in indices]
