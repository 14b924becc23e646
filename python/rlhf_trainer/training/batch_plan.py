"""The examples that train together. The plan is made once: a reference then sees the very same batches and padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

MicroBatch = list[int]  # positions of examples in the data


class Share(NamedTuple):
    """A micro-batch of one process and its weight in the mean over the whole batch."""

    indices: MicroBatch
    weight: float


def plan_batches(
    lengths: Sequence[int | tuple[bool, int]],
    batch_size: int,
    micro_batch_size: int,
    seed: int | None,
    sizes: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """lengths [N] -> batches of micro-batches that partition range(N); shuffled by `seed`, or in order for None.

    A length may have in front of it what examples of a micro-batch are to have in common, too.
    What is in a batch depends on the seed and batch_size only. Within a batch, examples of like length share a
    micro-batch: that spares padding and leaves the batch's mean what it is. sizes [N]: what each counts for in
    batch_size and micro_batch_size, as a prompt with several pairs does; 1 by default.
    """
    count = len(lengths)
    sizes = [1] * count if sizes is None else sizes
    order = range(count) if seed is None else torch.randperm(count, generator=_generator(seed)).tolist()
    batches = []
    for batch in _filled(order, sizes, batch_size):
        by_length = sorted(batch, key=lambda i: (lengths[i], i))
        batches.append(_filled(by_length, sizes, micro_batch_size))
    return batches


def _filled(order: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    """`order` cut wherever the next one would exceed `room`; one that exceeds it by itself stands alone."""
    parts: list[list[int]] = []
    left = 0
    for i in order:
        if not parts or sizes[i] > left:
            parts.append([])
            left = room
        parts[-1].append(i)
        left -= sizes[i]
    return parts


def epoch_order(batch_count: int, seed: int, epoch: int) -> list[int]:
    """The order of the batches in an epoch: as planned in the first one, shuffled anew in each later one."""
    if epoch == 0:
        return list(range(batch_count))
    return torch.randperm(batch_count, generator=_generator(seed + epoch)).tolist()


def share_of_process(
    batch: list[MicroBatch], rank: int, world: int, counts: Sequence[float] | None = None
) -> list[Share]:
    """The micro-batches of one process of `world`, each weighted so that the sum over all of them is the batch's mean.

    The mean is over what `counts` [N] counts: pairs, tokens; by default examples. Every process must run equally many
    forward passes, or the others would wait for it forever. Where micro-batches do not divide evenly, the missing ones
    repeat the first with weight 0.
    """
    parts = [len(micro) if counts is None else sum(counts[i] for i in micro) for micro in batch]
    shares = [Share(micro, part / sum(parts)) for micro, part in zip(batch, parts, strict=True)]
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
