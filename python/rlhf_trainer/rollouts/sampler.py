"""Rollouts: completions from the policy as it is now, with the log-probs that they were drawn at, behind one interface.

`LocalSampler` is transformers' generate on the very model that trains; `server.ServerSampler` sends requests to a
server. Both return the same: a `Completion` with the sampler's own log-probs, or a `Failure` with its reason.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk

from ..data.examples import Prompt
from .generation import Completion, Sampling, generate_batch


class GenerationRequest(NamedTuple):
    """A prompt to be continued; several requests may have the same one."""

    ids: list[int]  # as `data.encoding.encode_prompt` makes them
    text: str  # what they are of, for samplers that take no ids
    where: str  # "prompts.jsonl, row 7", for messages


def request_of(prompt: Prompt, source: str) -> GenerationRequest:
    return GenerationRequest(prompt.ids, prompt.text, f"{source}, row {prompt.row}")


class Failure(NamedTuple):
    """A prompt that had no completion at any try."""

    where: str
    reason: str


class Sampler(Protocol):
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, seed: int, number: int
    ) -> list[Completion | Failure]:
        """A completion for each request, in their order. (seed, number) seeds the draws: the same arguments give the
        same completions, where the sampler can do that."""

    def sync(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """The policy has changed: later completions are from this one. `folder` is free for the sampler's use."""


class LocalSampler:
    """transformers' generate, in this process, a call's prompts all at once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> None:
        self.model, self.tokenizer, self.bf16 = model, tokenizer, bf16

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, seed: int, number: int
    ) -> list[Completion | Failure]:
        return generate_batch(
            self.model, self.tokenizer, [request.ids for request in requests], sampling, seed=seed, number=number,
            bf16=self.bf16, with_logprobs=True,
        )  # fmt: skip

    def sync(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.model, self.tokenizer = model, tokenizer  # what trains is what draws: nothing has to travel


def mismatch(sampler_logprobs: Tensor, trainer_logprobs: Tensor) -> dict[str, float]:
    """sampler_logprobs, trainer_logprobs [N] of the same tokens, drawn by the sampler -> how far the two are apart.

    With d = trainer - sampler, nats a token: mean and largest |d|; mean, smallest and largest importance ratio e^d; and
    KL(sampler || trainer), as the mean of e^d - 1 - d. The first two have TRL's names. Without tokens, {}.
    """
    if sampler_logprobs.numel() == 0:
        return {}
    sampler, trainer = sampler_logprobs.detach().double(), trainer_logprobs.detach().double()
    difference = (trainer - sampler).abs()
    ratio = (trainer - sampler).exp()
    return {
        "sampling/sampling_logp_difference/mean": difference.mean().item(),
        "sampling/sampling_logp_difference/max": difference.max().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
        "sampling/kl": rk.kl_penalty(sampler, trainer, "k3").mean().item(),
    }
