"""Ops whose value is one loss of log-probs of sequences: anybody's log-probs will do."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from benchmarks.harness.case import HeadCase
from benchmarks.harness.linear_logprobs import eager_logprobs, of_counted, trl_logprobs
from benchmarks.harness.peers import TRL, Peer, compiled


@dataclass
class SequenceCase(HeadCase):
    """An op of `sequences` of n / sequences tokens."""

    shift: ClassVar[int] = 0  # tokens at a sequence's start that are no targets

    sequences: int = 4

    @abc.abstractmethod
    def loss_by(self, rows_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The loss, by log-probs that `rows_of(hidden [N, D], weight, targets [N])` computes."""

    def eager(self, *inputs: Tensor) -> Tensor:
        return self.loss_by(eager_logprobs, *inputs)

    def compiled_eager(self) -> Callable[..., Tensor]:
        return partial(self.loss_by, compiled(eager_logprobs))

    def true_value(self, *inputs: Tensor) -> Tensor:
        return self.loss_by(partial(of_counted, eager_logprobs), *inputs)

    def others(self) -> list[Peer]:
        by_trl = partial(self.loss_by, partial(of_counted, trl_logprobs))
        return [Peer(TRL, by_trl, note="its log-probs")]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sequences, self.n // self.sequences

    def label(self) -> dict:
        return super().label() | {"s": self.sequences, "t": self.n // self.sequences}

    def targets_of(self, rows: int | None) -> Tensor:
        """With `rows`, all but so many are masked: as many of each sequence."""
        if rows is None:
            return self.targets
        targets = self.targets.clone()
        targets[:, self.shift + rows // self.sequences :] = -100
        return targets

    @property
    def counted_share(self) -> float:
        return float((self.targets[:, self.shift :] != -100).sum()) / self.n

    def share(self, rows: int) -> float:
        return 1.0

    def small(self) -> dict:
        return super().small() | {"n": 2 * self.sequences}
