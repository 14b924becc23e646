"""Examples to tensors: labels, padding, batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .examples import TokenSequence

IGNORED = -100


class Batch(NamedTuple):
    """S sequences padded to one length T."""

    input_ids: Tensor  # [S, T] int64
    attention_mask: Tensor | None  # [S, T] int64, 0 on padding; None: position_ids say which tokens see each other
    labels: Tensor  # [S, T] int64, IGNORED where nothing is learned, as on prompt and padding
    position_ids: Tensor | None = None  # [S, T] int64; None: 0, 1, 2, ... in every row
    real: Tensor | None = None  # [S, T] int64, 0 on padding, where attention_mask does not say it

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor if tensor is None else tensor.to(device) for tensor in self))


def collate_sequences(sequences: list[TokenSequence], pad_id: int) -> Batch:
    """S conversations -> Batch of [S, T], padded on the right."""
    return _pad([(sequence.ids, labels_of(sequence)) for sequence in sequences], pad_id)


def labels_of(sequence: TokenSequence) -> list[int]:
    """The learned ids, IGNORED elsewhere and at the first token, which nothing predicts."""
    labels = [i if counted else IGNORED for i, counted in zip(sequence.ids, sequence.counted, strict=True)]
    return [IGNORED, *labels[1:]]


def pad_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (prompt, response) -> Batch of [S, T]; the responses are the labels."""
    return _pad([(prompt + response, [IGNORED] * len(prompt) + response) for prompt, response in sequences], pad_id)


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (ids, labels) -> Batch of [S, T], padded on the right, where no real token of a causal model sees it."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (ids, targets) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.tensor(targets)
    return Batch(input_ids, attention_mask, labels)
