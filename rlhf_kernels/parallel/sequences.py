"""Sums of log-probs by sequence, over a head or sequences that are split over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._logits import LMHead
from .._packing import Packing, packing_of
from .._rows import is_traced_or_captured
from ..logprob import SequenceLogprobs, logprobs_under, next_token_targets, totals_of
from .logprobs import sharded_logprobs
from .shards import exchanged, gather, local_head


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    shift: bool = True,
    average: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLogprobs:
    """`rlhf_kernels.sequence_logprobs` over a head, or over sequences, or both, that are split over ranks.

    Args:
        weight, bias, group: as in `linear_logprobs` of this module; with `sequence_group`, also the whole head.
        sequence_group: each of its ranks holds a part of the positions of every sequence: hidden [B, T_local, D], and
            as labels [B, T_local] the targets of these positions. B is the same on every rank, T_local need not be.
        shift: must be False with `sequence_group`, where the next token may be on another rank.
        cu_seqlens: with `sequence_group`, of this rank's tokens; every sequence has its place on every rank, if an
            empty one. position_ids cannot say that, and raise there.
        hidden, labels, the rest: as in `rlhf_kernels.sequence_logprobs`, replicated over `group`.

    Returns:
        SequenceLogprobs of whole sequences, the same bits on every rank of both groups. Gradients must come in the same
        on every rank of both; they go out once, to the rank that has the position (and the head's row), so that the
        head's are to be summed over `sequence_group`.

    Raises: as `rlhf_kernels.sequence_logprobs` and as `linear_logprobs` of this module, on every rank alike, and
        ValueError: `sequence_group` with shift, or with position_ids; numbers of sequences that differ.
    """
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    head.check_options(temperature)
    sequences = ShardedSequences(
        labels, group, sequence_group, shift, average, temperature, ignore_index, backend, cu_seqlens, position_ids
    )
    return sequences.logprobs(hidden, head)


class ShardedSequences(NamedTuple):
    """Sequences whose head, or positions, or both are split over ranks, and how their log-probs are wanted."""

    labels: Tensor
    group: dist.ProcessGroup | None
    sequence_group: dist.ProcessGroup | None
    shift: bool
    average: bool
    temperature: float
    ignore_index: int
    backend: str
    cu_seqlens: Tensor | None
    position_ids: Tensor | None

    def check(self) -> None:
        if self.sequence_group is None:
            return
        if self.shift:
            raise ValueError(
                "with sequence_group the token after a rank's last position is on another rank: shift the labels "
                "before they are split, and pass shift=False"
            )
        if self.position_ids is not None:
            raise ValueError(
                "with sequence_group a sequence need not begin on this rank, so position_ids cannot tell sequences "
                "apart: pass cu_seqlens of this rank's tokens"
            )

    def logprobs(self, hidden: Tensor, head: LMHead) -> SequenceLogprobs:
        self.check()
        group = self.sequence_group
        if group is None:
            return self._of_own_positions(hidden, head)

        def prepare() -> tuple[SequenceLogprobs, dict[str, Any]]:
            own = self._of_own_positions(hidden, head)
            return own, {"the number of sequences": own.token_counts.shape[0]}

        own = prepare()[0] if is_traced_or_captured(hidden) else exchanged(prepare, group, hidden.device, 0)[0]
        # One collective for both; fp64 holds counts exactly.
        both = torch.stack((own.logprobs.double(), own.token_counts.double()))
        totals, tokens = _TotalOverRanks.apply(both, group)  # type: ignore[no-untyped-call]
        counts, totals = tokens.detach().to(torch.int64), totals.to(own.logprobs.dtype)
        return SequenceLogprobs(totals / counts.clamp(min=1) if self.average else totals, counts)

    def _of_own_positions(self, hidden: Tensor, head: LMHead) -> SequenceLogprobs:
        packing: Packing | None = None

        def make_targets() -> Tensor:
            nonlocal packing
            packing = packing_of(hidden, self.labels, self.cu_seqlens, self.position_ids, "[B, T, D]")
            return next_token_targets(self.labels, self.ignore_index, packing) if self.shift else self.labels

        options = (self.temperature, self.ignore_index, (), self.backend)
        if self.sequence_group is not None and self.group is None and not isinstance(head.weight, DTensor):
            targets = make_targets()
            per_token = logprobs_under(head, hidden, targets, *options)
        else:
            per_token, targets = sharded_logprobs(hidden, local_head(head, self.group), make_targets, *options)
        average = self.average and self.sequence_group is None
        return totals_of(per_token.logprobs, targets, average, self.ignore_index, packing)


class _TotalOverRanks(torch.autograd.Function):
    """x [...] -> its sum over the ranks, in their order. The loss made of it is computed on every rank and is one loss,
    not one a rank: its gradient is every rank's as it comes, and is not summed."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        return gather(x, group).sum(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return grad, None
