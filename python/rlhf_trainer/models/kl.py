"""Exact KL(policy || reference) along sequences: of the whole next-token distributions, in nats."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

from ..data.batches import IGNORED, Batch, pad_sequences
from ..training.journal import RunBatch, batches_of_like_length, compute_only
from .fused_lm import FusedLM, LMHead


def kl_of_sequences(
    policy: FusedLM,
    reference: FusedLM,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    pad_id: int,
    run: RunBatch = compute_only,
) -> list[float]:
    """`kl_per_sequence` of (prompt, response) ids, in their order."""
    values = [0.0] * len(sequences)
    for positions in batches_of_like_length([len(p) + len(r) for p, r in sequences], batch_size):

        def measure(positions: list[int] = positions) -> list[float]:
            batch = pad_sequences([sequences[i] for i in positions], pad_id).to(policy.model.device)
            return kl_per_sequence(policy, reference, batch).tolist()

        for i, value in zip(positions, run(measure), strict=True):
            values[i] = value
    return values


@torch.no_grad()
def kl_per_sequence(policy: FusedLM, reference: FusedLM, batch: Batch) -> Tensor:
    """[S] nats: exact KL(policy || reference) before each token that batch.labels count, summed over the sequence."""
    counted = batch.labels[:, 1:] != IGNORED
    return kl_per_token(states_of(policy, batch), states_of(reference, batch), counted).sum(-1)


class States(NamedTuple):
    """Hidden states before the head, [S, T, D], and the head."""

    hidden: Tensor
    head: LMHead


def states_of(model: FusedLM, batch: Batch) -> States:
    return model(batch, States)


def kl_per_token(policy: States, reference: States, counted: Tensor, temperature: float = 1.0) -> Tensor:
    """[S, T - 1] nats: exact KL(policy || reference) before each token but the first, 0 where not `counted`; with a
    gradient to the policy's side."""
    head, ref_head = policy.head, reference.head
    return rk.linear_kl(
        policy.hidden[:, :-1], head.weight, reference.hidden[:, :-1], ref_head.weight, counted.contiguous(),
        bias=head.bias, ref_bias=ref_head.bias, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap,
        ref_logit_scale=ref_head.logit_scale, ref_logit_softcap=ref_head.logit_softcap, temperature=temperature,
    )  # fmt: skip
