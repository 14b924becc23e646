"""Completions on their way from the sampler to the loss: drawn, rewarded, and seen by the models that train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import rlhf_kernels as rk

from ..data.examples import IGNORED, Batch, pad_sequences
from ..models.kl import States, kl_per_token
from ..models.loading import FusedLM, LMHead
from ..training.batch_plan import MicroBatch

Part, Result = TypeVar("Part"), TypeVar("Result")


class Episode(NamedTuple):
    """A completion and what is known of it; tensors are fp32 on the CPU, [T] for its T tokens, None where not asked.

    All log-probs are at the sampling temperature, in nats.
    """

    row: int  # of its prompt in the data
    prompt: list[int]
    ids: list[int]  # of the completion, with the token that ends it
    finished: bool
    reward: float  # the weighted sum of what judges it
    sampler_logprobs: Tensor | None  # as the sampler drew
    logprobs: Tensor | None = None  # by the policy before this iteration's updates
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None  # exact KL(policy || reference) before each token
    values: Tensor | None = None  # of the state before each token
    advantages: Tensor | None = None  # [T], or scalar where all tokens share it
    returns: Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    def told(self) -> Told:
        return Told(self.row, self.prompt, self.ids, self.reward)


class Told(NamedTuple):
    """Of an episode, for a file that a person reads."""

    row: int
    prompt: list[int]
    completion: list[int]
    reward: float


class Seen(NamedTuple):
    """What a model makes of a batch's completions, each [S, T - 1], 0 where not `mask`."""

    mask: Tensor  # bool: the tokens of completions
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None  # exact, of the next-token distributions
    values: Tensor | None = None


def see(model: nn.Module, batch: Batch, temperature: float, reference: States | None = None) -> Seen:
    """`model`: a FusedLM or an ActorCritic, wrapped or not; `reference`: the reference's, where exact KL is wanted."""
    targets = targets_of(batch)
    mask = targets != IGNORED

    def use(hidden: Tensor, head: LMHead, values: Tensor | None = None) -> Seen:
        states = States(hidden, head)
        found = logprobs_of(states, targets, temperature, ("entropy",))
        kl = None if reference is None else kl_per_token(states, reference, mask, temperature)
        values = None if values is None else torch.where(mask, values[:, :-1], 0.0)
        return Seen(mask, found.logprobs, found.entropy, kl, values)

    return model(batch, use)


def logprobs_of(
    states: States, targets: Tensor, temperature: float, outputs: tuple[str, ...] = ()
) -> rk.LinearLogprobs:
    """Of the tokens [S, T - 1] that follow the states' first T - 1."""
    hidden, head = states
    return rk.linear_logprobs(
        hidden[:, :-1], head.weight, targets, **head.options(), temperature=temperature, outputs=outputs
    )


def targets_of(batch: Batch) -> Tensor:
    return batch.labels[:, 1:].contiguous()


@torch.no_grad()
def looked_at(
    episodes: Sequence[Episode],
    plan: Sequence[MicroBatch],
    model: nn.Module,
    reference: FusedLM | None,
    accelerator: Accelerator,
    *,
    pad_id: int,
    temperature: float,
    exact_kl: bool,
) -> list[Episode]:
    """The episodes with the log-probs, values and KL of the models as they are now.

    `plan`: the micro-batches in which the policy will learn from them. Padded alike, it gives the same bits then, so
    the first ratio is exactly 1.
    """

    def said(states: States, batch: Batch) -> Tensor:  # within the model's call, so in the precision of the policy's
        return logprobs_of(states, targets_of(batch), temperature).logprobs

    def look(indices: MicroBatch) -> list[dict[str, Tensor]]:
        part = [episodes[i] for i in indices]
        batch = batch_of(part, pad_id).to(accelerator.device)
        states = ref_logprobs = None
        if reference is not None:
            states, ref_logprobs = reference(batch, lambda *states: (States(*states), said(States(*states), batch)))
        seen = see(model, batch, temperature, states if exact_kl else None)
        found = {"logprobs": seen.logprobs, "kl": seen.kl, "values": seen.values, "ref_logprobs": ref_logprobs}
        sizes = [len(episode.ids) for episode in part]
        split = {name: unpadded(tensor, seen.mask, sizes) for name, tensor in found.items() if tensor is not None}
        return [{name: tensors[k] for name, tensors in split.items()} for k in range(len(part))]

    found: list[Episode] = list(episodes)
    for indices, parts in zip(plan, over_processes(plan, look, accelerator), strict=True):
        for i, tensors in zip(indices, parts, strict=True):
            found[i] = episodes[i]._replace(**tensors)
    return found


def over_processes(parts: Sequence[Part], work: Callable[[Part], Result], accelerator: Accelerator) -> list[Result]:
    """`work` of each part, in their order, known to every process; each process does its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    done = [(k, work(parts[k])) for k in range(rank, len(parts), world)]
    everyone = gather_object(done) if world > 1 else done
    return [result for _, result in sorted(everyone, key=lambda item: item[0])]


def batch_of(episodes: Sequence[Episode], pad_id: int) -> Batch:
    """[S, T]; the completions are the labels."""
    return pad_sequences([(episode.prompt, episode.ids) for episode in episodes], pad_id)


def padded(tensors: Sequence[Tensor | None], mask: Tensor) -> Tensor | None:
    """[T_i] each -> [S, T - 1] where `mask` says, 0 elsewhere; None if they are."""
    if tensors[0] is None:
        return None
    rows = torch.zeros(mask.shape, device=mask.device)
    rows[mask] = torch.cat(list(tensors)).to(mask.device)
    return rows


def unpadded(rows: Tensor, mask: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `padded`, on the CPU."""
    return list(rows[mask].float().cpu().split(list(sizes)))
