"""Which pairs train together. The plan is made once, so that the reference sees the very same batches and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

MicroBatch = list[int]  # positions of pairs in the data


class Share(NamedTuple):
    """A micro-batch of one process and its weight in the mean over the whole batch."""

    indices: MicroBatch
    weight: float


def plan_batches(
    lengths: Sequence[int], batch_size: int, micro_batch_size: int, seed: int | None
) -> list[list[MicroBatch]]:
    """lengths [N] -> batches of micro-batches that partition range(N); shuffled by `seed`, or in order for None.

    What is in a batch depends on the seed and batch_size only. Within a batch, pairs of like length share a
    micro-batch: that spares padding and leaves the batch's mean what it is.
    """
    count = len(lengths)
    order = torch.arange(count) if seed is None else torch.randperm(count, generator=_generator(seed))
    batches = []
    for batch in order.split(batch_size):
        by_length = sorted(batch.tolist(), key=lambda i: (lengths[i], i))
        batches.append([by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)])
    return batches


def epoch_order(batch_count: int, seed: int, epoch: int) -> list[int]:
    """The order of the batches in an epoch: as planned in the first one, shuffled anew in each later one."""
    if epoch == 0:
        return list(range(batch_count))
    return torch.randperm(batch_count, generator=_generator(seed + epoch)).tolist()


def share_of_process(batch: list[MicroBatch], rank: int, world: int) -> list[Share]:
    """The micro-batches of one process of `world`, each weighted so that the sum over all of them is the batch's mean.

    Every process must run equally many forward passes, or the others would wait for it forever. Where micro-batches
    do not divide evenly, the missing ones repeat the first with weight 0.
    """
    pairs = sum(len(micro) for micro in batch)
    shares = [Share(micro, len(micro) / pairs) for micro in batch]
    shares += [Share(batch[0], 0.0)] * (-len(shares) % world)
    return shares[rank::world]


def step_plan(batch_count: int, epochs: int, max_steps: int | None, seed: int) -> list[int]:
    """The batch of every optimizer step of the run, in order."""
    if max_steps is not None:
        epochs = -(-max_steps // batch_count)
    steps = [batch for epoch in range(epochs) for batch in epoch_order(batch_count, seed, epoch)]
    return steps[:max_steps]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
