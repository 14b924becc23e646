"""Completions on their way from the sampler to the loss: rewarded, and scored by the models that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ..data.batches import IGNORED, Batch, pad_rows
from ..models.fused_lm import LMHead
from ..models.kl import States, kl_per_token
from ..training.batch_plan import MicroBatch
from ..training.fsdp import sharding
from ..training.processes import over_processes
from .setup import Setup


class Episode(NamedTuple):
    """A completion and its scores; tensors are fp32 on the CPU, [T] for the model's T tokens, None where not needed.

    All log-probs are at the sampling temperature, in nats.
    """

    row: int  # the prompt's, in the data
    prompt: list[int]
    ids: list[int]  # the completion's, with the token that ends it
    finished: bool
    reward: float  # the weighted sum of all rewards
    sampler_logprobs: Tensor | None  # as the sampler drew
    logprobs: Tensor | None = None  # by the policy before this iteration's updates
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None  # exact KL(policy || reference) before each token
    values: Tensor | None = None  # of the state before each token
    advantages: Tensor | None = None  # [T], or scalar where all tokens share it
    returns: Tensor | None = None
    learned: list[bool] | None = None  # which of ids are the model's, and are counted by T; None: all

    @property
    def tokens(self) -> int:
        """T, the number of tokens that the model drew."""
        return len(self.ids) if self.learned is None else sum(self.learned)

    @property
    def labels(self) -> list[int]:
        if self.learned is None:
            return self.ids
        return [id if learned else IGNORED for id, learned in zip(self.ids, self.learned, strict=True)]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    def record(self) -> EpisodeRecord:
        return EpisodeRecord(self.row, self.prompt, self.ids, self.reward)


class EpisodeRecord(NamedTuple):
    """An episode in a file that a person reads."""

    row: int
    prompt: list[int]
    completion: list[int]
    reward: float


class PolicyOutput(NamedTuple):
    """A model's output for a batch of completions, each [S, T - 1], 0 where not `mask`."""

    mask: Tensor  # bool: the tokens of completions
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None  # exact, of the next-token distributions
    values: Tensor | None = None


def forward(model: nn.Module, batch: Batch, temperature: float, reference: States | None = None) -> PolicyOutput:
    """The model's output for a batch. `model`: a FusedLM or an ActorCritic, wrapped or not; `reference`: the
    reference's hidden states, where exact KL is wanted."""
    targets = targets_of(batch)
    mask = targets != IGNORED

    def use(hidden: Tensor, head: LMHead, values: Tensor | None = None) -> PolicyOutput:
        states = States(hidden, head)
        outputs = logprobs_of(states, targets, temperature, ("entropy",))
        kl = None if reference is None else kl_per_token(states, reference, mask, temperature)
        values = None if values is None else torch.where(mask, values[:, :-1], 0.0)
        return PolicyOutput(mask, outputs.logprobs, outputs.entropy, kl, values)

    return model(batch, use)


def logprobs_of(
    states: States, targets: Tensor, temperature: float, outputs: tuple[str, ...] = ()
) -> rk.LinearLogprobs:
    """Log-probs of the tokens [S, T - 1] that follow the states' first T - 1."""
    hidden, head = states
    return rk.linear_logprobs(
        hidden[:, :-1], head.weight, targets, **head.options(), temperature=temperature, outputs=outputs
    )


def targets_of(batch: Batch) -> Tensor:
    """The next tokens [S, T - 1] where these are of completions, else IGNORED."""
    return batch.labels[:, 1:].contiguous()


@torch.no_grad()
def score_episodes(
    setup: Setup, model: nn.Module, episodes: Sequence[Episode], plan: Sequence[MicroBatch], *, with_reference: bool
) -> list[Episode]:
    """The episodes with the log-probs, values and KL of the models as they are now.

    `plan`: the micro-batches in which the policy will learn from them. Padded alike, it gives the same bits then, so
    the first ratio is exactly 1.
    """
    config = setup.config

    def ref_scores(batch: Batch) -> tuple[States, Tensor]:
        def use(hidden: Tensor, head: LMHead) -> tuple[States, Tensor]:  # within the call, so in the policy's precision
            states = States(hidden, head)
            return states, logprobs_of(states, targets_of(batch), config.temperature).logprobs

        return setup.reference(batch, use)

    def score(indices: MicroBatch) -> list[dict[str, Tensor]]:
        part = [episodes[i] for i in indices]
        batch = batch_of(part, setup.pad_id).to(setup.accelerator.device)
        reference, ref_logprobs = ref_scores(batch) if with_reference else (None, None)
        output = forward(model, batch, config.temperature, reference if config.kl_estimator == "exact" else None)
        rows = {
            "logprobs": output.logprobs, "kl": output.kl, "values": output.values, "ref_logprobs": ref_logprobs
        }  # fmt: skip
        sizes = [episode.tokens for episode in part]
        split = {name: unpad(tensor, output.mask, sizes) for name, tensor in rows.items() if tensor is not None}
        return [{name: tensors[k] for name, tensors in split.items()} for k in range(len(part))]

    scored: list[Episode] = list(episodes)
    results = over_processes(plan, score, setup.accelerator, in_step=sharding() is not None)
    for indices, parts in zip(plan, results, strict=True):
        for i, tensors in zip(indices, parts, strict=True):
            scored[i] = episodes[i]._replace(**tensors)
    return scored


def batch_of(episodes: Sequence[Episode], pad_id: int) -> Batch:
    """The episodes as a batch [S, T]; what the model drew are the labels."""
    return pad_rows([(one.prompt + one.ids, [IGNORED] * len(one.prompt) + one.labels) for one in episodes], pad_id)


def pad(tensors: Sequence[Tensor | None], mask: Tensor) -> Tensor | None:
    """Tensors [T_i] of S completions -> [S, T - 1], 0 where not `mask`; None if they are None."""
    if tensors[0] is None:
        return None
    rows = torch.zeros(mask.shape, device=mask.device)
    rows[mask] = torch.cat(list(tensors)).to(mask.device)
    return rows


def unpad(rows: Tensor, mask: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `pad`, on the CPU."""
    return list(rows[mask].float().cpu().split(list(sizes)))
