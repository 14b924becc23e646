"""Examples to tensors: labels, padding, batches."""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .examples import TokenSequence

IGNORED = -100


class Batch(NamedTuple):
    """S sequences padded to one length T."""

    input_ids: Tensor  # [S, T] int64
    attention_mask: Tensor | None  # [S, T] int64, 0 on padding; None: position_ids say which tokens see each other
    labels: Tensor  # [S, T] int64, IGNORED where nothing is learned, as on prompt and padding
    position_ids: Tensor | None = None  # [S, T] int64; None: 0, 1, 2, ... in every row
    real: Tensor | None = None  # [S, T] int64, 0 on padding, where attention_mask does not say it

    def to(self, device: torch.device) -> Self:
        return Batch(*(tensor if tensor is None else tensor.to(device) for tensor in self))


def collate_sequences(sequences: list[TokenSequence], pad_id: int) -> Batch:
    """S conversations -> Batch of [S, T], padded on the right."""
    return pad_rows([(sequence.ids, labels_of(sequence)) for sequence in sequences], pad_id)


def labels_of(sequence: TokenSequence) -> list[int]:
    """The learned ids, IGNORED elsewhere and at the first token, which nothing predicts."""
    labels = [i if counted else IGNORED for i, counted in zip(sequence.ids, sequence.counted, strict=True)]
    return [IGNORED, *labels[1:]]


def next_tokens(labels: Tensor) -> Tensor:
    """[S, T] -> [S, T]: what each position predicts, which is the next one's label."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def pad_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (prompt, response) -> Batch of [S, T]; the responses are the labels."""
    return pad_rows([(prompt + response, [IGNORED] * len(prompt) + response) for prompt, response in sequences], pad_id)


def pad_rows(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """S (ids, labels) -> Batch of [S, T], padded on the right, where no real token of a causal model sees it."""
    ids, labels = ([torch.tensor(part, dtype=torch.int64) for part in parts] for parts in zip(*rows, strict=True))
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return Batch(pad_sequence(ids, True, pad_id), attention_mask, pad_sequence(labels, True, IGNORED))
