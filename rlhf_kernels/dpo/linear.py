"""`linear_dpo_loss`: hidden states in, scalar loss out. It owns no loss maths; it joins log-probs to `dpo_loss`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_same_device, check_vectors
from .._logits import LMHead
from .._packing import packing_of
from ..logprob import SequenceLogprobs, logprobs_under, next_token_targets, totals_of
from .pairwise import check_loss_options, dpo_loss
from .reference import LOSS_TYPES, LossOptions


class LinearDPOLoss(NamedTuple):
    """`loss` scalar; `chosen_rewards`, `rejected_rewards` [P] and `policy_logps`, `ref_logps` [S] without gradient."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    policy_logps: Tensor
    ref_logps: Tensor | None


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    chosen_idxs: Tensor | None = None,
    rejected_idxs: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> LinearDPOLoss:
    r"""Mean DPO loss over pairs, from the last hidden states of policy and reference.

        loss = mean_P dpo_loss(sequence_logprobs(hidden, weight, labels), ref_logps, chosen_idxs, rejected_idxs)

    Args:
        hidden: [S, T, D], the policy's last hidden states. weight: [V, D], bias: [V] or None, its LM head.
        labels: [S, T] int64, -100 where masked; shifted inside (position t predicts labels[:, t + 1]).
        ref_logps: [S] precomputed sums under the reference; or else ref_hidden [S, T, D'] and ref_weight [V, D'] (and
            ref_bias), from which they are computed without gradient. Neither for reference-free types.
        chosen_idxs, rejected_idxs: [P] int64 pairs; default: first half chosen, second half rejected.
        beta, loss_type, label_smoothing, gamma: as in `dpo_loss`, every type of it.
        temperature, logit_scale, logit_softcap, backend: as in `linear_logprobs`, for policy and reference alike.
        cu_seqlens, position_ids: as in `sequence_logprobs`, for S packed sequences: hidden [1, N, D] or [N, D], labels
            [1, N] or [N], and ref_hidden packed alike. Padding that position_ids count as a sequence counts in S.

    Returns:
        LinearDPOLoss. `set_workspace_budget` says which logits are kept for backward, which saves up to one GEMM of
        four (native).

    Raises:
        ValueError: odd S without index pairs, both or no references, P = 0, and as `sequence_logprobs` and `dpo_loss`.
        TypeError, IndexError: as `sequence_logprobs` and `dpo_loss`.

    Source: Rafailov et al. (2023), arXiv:2305.18290; the other types are listed in `dpo_loss`.
    """
    packing = packing_of(hidden, labels, cu_seqlens, position_ids, "[S, T, D]")
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    head.check_options(temperature)
    targets = next_token_targets(labels, -100, packing)

    def sequences(hidden: Tensor, head: LMHead) -> SequenceLogprobs:
        per_token = logprobs_under(head, hidden, targets, temperature, -100, (), backend).logprobs
        return totals_of(per_token, targets, False, -100, packing)

    return loss_of_sequences(
        sequences, hidden.shape[0] if packing is None else packing.size, hidden, head,
        Reference(ref_logps, ref_hidden, ref_weight, ref_bias), (chosen_idxs, rejected_idxs),
        LossOptions(loss_type, beta, label_smoothing, gamma), backend,
    )  # fmt: skip


class Reference(NamedTuple):
    """The reference's log-probabilities [S], or its hidden states [S, T, D'] and head to compute them from, or none."""

    logps: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def check(self, hidden: Tensor, options: LossOptions, size: int) -> None:
        """`hidden`: the policy's; `size`: the number of sequences."""
        if (self.hidden is None) != (self.weight is None):
            raise ValueError("pass both ref_hidden and ref_weight, or neither")
        if self.bias is not None and self.hidden is None:
            raise ValueError("ref_bias belongs to ref_hidden and ref_weight, which were not given")
        count = (self.logps is not None) + (self.hidden is not None)
        reference_free = LOSS_TYPES[options.loss_type].reference_free
        if reference_free and count:
            raise ValueError(f"loss_type={options.loss_type!r} takes no reference")
        if not reference_free and count != 1:
            raise ValueError(
                f"loss_type={options.loss_type!r} needs one reference, ref_logps or else ref_hidden with ref_weight; "
                f"got {'both' if count else 'none'}"
            )
        if self.logps is not None:
            check_vectors(size, ref_logps=self.logps)
            check_same_device(hidden=hidden, ref_logps=self.logps)
        if self.hidden is not None and self.hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"ref_hidden must be {(*hidden.shape[:-1], 'D')}, got {tuple(self.hidden.shape)}")


def loss_of_sequences(
    sequences: Callable[[Tensor, LMHead], SequenceLogprobs],
    size: int,
    hidden: Tensor,
    head: LMHead,
    reference: Reference,
    idxs: tuple[Tensor | None, Tensor | None],
    options: LossOptions,
    backend: str,
) -> LinearDPOLoss:
    """`sequences(hidden, head)`: the log-probs of the `size` sequences, of policy and reference alike; `idxs`: those of
    chosen and rejected responses."""
    check_loss_options(*options)
    reference.check(hidden, options, size)
    chosen, rejected = _pairs(hidden, *idxs, size)
    logps, counts = sequences(hidden, head)
    ref_logps = reference.logps
    if reference.hidden is not None and reference.weight is not None:
        with torch.no_grad():
            ref_logps, _ = sequences(reference.hidden, head._replace(weight=reference.weight, bias=reference.bias))
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    losses, rewards = dpo_loss(
        logps, ref_logps, chosen, rejected, options.beta, loss_type=options.loss_type,
        label_smoothing=options.label_smoothing, token_counts=counts, gamma=options.gamma, backend=backend,
    )  # fmt: skip
    return LinearDPOLoss(losses.mean(), _picked(rewards, chosen), _picked(rewards, rejected), logps.detach(), ref_logps)


def _picked(rewards: Tensor, idxs: Tensor) -> Tensor:
    """rewards [S], idxs [P] -> [P]; NaN where an index is outside [0, S), as that pair's loss is on a GPU. Torch's own
    indexing would end the CUDA context there."""
    inside = (idxs >= 0) & (idxs < rewards.shape[0])
    return rewards[idxs.where(inside, 0)].where(inside, math.nan)


def _pairs(hidden: Tensor, chosen: Tensor | None, rejected: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The index pairs, by default the halves of `size` sequences."""
    if (chosen is None) != (rejected is None):
        raise ValueError("pass both chosen_idxs and rejected_idxs, or neither")
    if chosen is None or rejected is None:
        if size % 2:
            raise ValueError(
                f"without index pairs the first half is chosen and the second rejected: S must be even, got {size}"
            )
        chosen = torch.arange(size // 2, device=hidden.device)
        rejected = chosen + size // 2
    if chosen.numel() == 0:
        raise ValueError("no pairs: the mean loss of an empty batch is undefined")
    return chosen, rejected
