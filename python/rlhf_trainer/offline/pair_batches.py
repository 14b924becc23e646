"""Preferences for training: the responses to one prompt, each computed once, and the pairs that compare them."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.base import PairConfig
from ..data.examples import Batch, Pair, load_pairs, pad_sequences
from ..training.batch_plan import MicroBatch
from ..training.loop import Task, plan_of


class Group(NamedTuple):
    """Token ids of a prompt and of K responses to it; `pairs` are positions of (better, worse) among these."""

    row: int
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    margins: list[float]

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt) + max(map(len, self.responses))


class PairBatch(NamedTuple):
    """G groups: their S responses as sequences, and the P pairs among all of them."""

    batch: Batch
    labels: Tensor  # [S, T'] int64, as `hidden_of` lays hidden states out
    chosen_idxs: Tensor  # [P] int64 into [0, S)
    rejected_idxs: Tensor  # [P]
    margins: Tensor  # [P] fp32
    gather: Tensor | None = None  # [S, T'] positions in the flattened batch, where rows hold more than one sequence

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(*(part if part is None else part.to(device) for part in self))

    def hidden_of(self, hidden: Tensor) -> Tensor:
        """The model's hidden states of the batch -> [S, T', D], a row for each response."""
        return hidden if self.gather is None else hidden.flatten(0, 1)[self.gather]


def group_pairs(pairs: list[Pair]) -> list[Group]:
    """Pairs of one row and prompt become a group, in which responses of the same tokens are one."""
    groups = []
    for (row, prompt), members in groupby(pairs, key=lambda pair: (pair.row, pair.prompt)):
        responses: list[list[int]] = []
        indices, margins = [], []
        for pair in members:
            responses += [ids for ids in (pair.chosen, pair.rejected) if ids not in responses]
            indices.append((responses.index(pair.chosen), responses.index(pair.rejected)))
            margins.append(pair.margin)
        groups.append(Group(row, prompt, responses, indices, margins))
    return groups


def collate_groups(groups: list[Group], pad_id: int) -> PairBatch:
    """A row for each response: its prompt, then itself."""
    batch = pad_sequences([(group.prompt, response) for group in groups for response in group.responses], pad_id)
    return PairBatch(batch, batch.labels, *pairs_of(groups))


def pairs_of(groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """chosen_idxs, rejected_idxs, margins [P] among the responses of all groups, in their order."""
    chosen, rejected, first = [], [], 0
    for group in groups:
        chosen += [first + better for better, _ in group.pairs]
        rejected += [first + worse for _, worse in group.pairs]
        first += len(group.responses)
    margins = torch.tensor([margin for group in groups for margin in group.margins], dtype=torch.float32)
    return torch.tensor(chosen), torch.tensor(rejected), margins


def load_groups(
    config: PairConfig, tokenizer: PreTrainedTokenizerBase, source: str, split: str, accelerator: Accelerator
) -> list[Group]:
    """Reads one data set, and reports on it."""
    data = load_pairs(
        source, tokenizer, split=split, format=config.dataset_format, streaming=config.streaming,
        max_prompt_length=config.max_prompt_length, max_length=config.max_length,
        skip_invalid_rows=config.skip_invalid_rows,
    )  # fmt: skip
    accelerator.print(data.report(source))
    return group_pairs(data.examples)


class GroupTask(Task):
    """A task whose examples are groups; means are over their pairs."""

    def __init__(
        self, config: PairConfig, groups: list[Group], pad_id: int, accelerator: Accelerator, shuffled: bool
    ) -> None:
        sizes = [len(group.pairs) for group in groups]
        plan = plan_of(config, [group.length for group in groups], accelerator, shuffled=shuffled, sizes=sizes)
        super().__init__(plan, sizes, accelerator.device)
        self.config, self.groups, self.pad_id = config, groups, pad_id

    def examples(self, indices: MicroBatch) -> list[Group]:
        return [self.groups[i] for i in indices]
