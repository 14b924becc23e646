"""`linear_dpo_loss`: hidden states in, scalar loss out. It owns no loss maths; it joins log-probs to `dpo_loss`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_same_device, check_vectors
from .._logits import LogitTransform
from .._packing import packing_of
from ..logprob import SequenceLogprobs, _sequence_logprobs
from .pairwise import check_loss_options, dpo_loss
from .reference import LOSS_TYPES


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
    transform = LogitTransform.checked(temperature, logit_scale, logit_softcap)

    def sequences(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SequenceLogprobs:
        return _sequence_logprobs(hidden, weight, labels, bias, transform, True, False, -100, backend, packing)

    return _loss_of_sequences(
        sequences, hidden.shape[0] if packing is None else packing.size, (hidden, weight, bias), ref_logps,
        (ref_hidden, ref_weight, ref_bias), chosen_idxs, rejected_idxs, beta, loss_type, label_smoothing, gamma,
        backend,
    )  # fmt: skip


def _loss_of_sequences(
    sequences: Callable[[Tensor, Tensor, Tensor | None], SequenceLogprobs],
    size: int,
    policy: tuple[Tensor, Tensor, Tensor | None],
    ref_logps: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    chosen_idxs: Tensor | None,
    rejected_idxs: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    gamma: float,
    backend: str,
) -> LinearDPOLoss:
    """`sequences(hidden, weight, bias)`: the log-probs of the `size` sequences, of policy and reference alike."""
    check_loss_options(beta, loss_type, label_smoothing, gamma)
    hidden = policy[0]
    _check_reference(hidden, ref_logps, *reference, LOSS_TYPES[loss_type].reference_free, loss_type, size)
    chosen, rejected = _pairs(hidden, chosen_idxs, rejected_idxs, size)
    logps, counts = sequences(*policy)
    ref_hidden, ref_weight, ref_bias = reference
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logps, _ = sequences(ref_hidden, ref_weight, ref_bias)
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    losses, rewards = dpo_loss(
        logps, ref_logps, chosen, rejected, beta, loss_type=loss_type, label_smoothing=label_smoothing,
        token_counts=counts, gamma=gamma, backend=backend,
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


def _check_reference(
    hidden: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    reference_free: bool,
    loss_type: str,
    size: int,
) -> None:
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("pass both ref_hidden and ref_weight, or neither")
    if ref_bias is not None and ref_hidden is None:
        raise ValueError("ref_bias belongs to ref_hidden and ref_weight, which were not given")
    given = (ref_logps is not None) + (ref_hidden is not None)
    if reference_free and given:
        raise ValueError(f"loss_type={loss_type!r} takes no reference")
    if not reference_free and given != 1:
        raise ValueError(
            f"loss_type={loss_type!r} needs one reference, ref_logps or else ref_hidden with ref_weight; "
            f"got {'both' if given else 'none'}"
        )
    if ref_logps is not None:
        check_vectors(size, ref_logps=ref_logps)
        check_same_device(hidden=hidden, ref_logps=ref_logps)
    if ref_hidden is not None and ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden must be {(*hidden.shape[:-1], 'D')}, got {tuple(ref_hidden.shape)}")
