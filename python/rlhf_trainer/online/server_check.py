"""Whether servers have the policy that trains: the same tokens, and the same log-probs as far as bf16 goes; and whether
all weights come to them that are sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..errors import UsageError
from ..rollouts.http_json import RequestError, Server
from ..rollouts.sampler import request_of
from ..rollouts.server import Probe, ServerSampler
from ..training.fsdp import local, reshard
from .episodes import Episode, batch_of, forward
from .setup import Setup

PROMPTS = 4  # that are compared
# What bf16 moves a log-prob, on average, at least, as a policy that is in bf16 itself cannot measure it. From vLLM's
# SmolLM2-135M, the same in fp32 is 0.063 nats, in bf16 0.108, and with 3% of noise in its weights 0.43.
ROUNDING_NATS = 0.05
TIMES = 4  # as much as bf16 moves the policy's own log-probs: a server rounds more than autocast does


def check_server(setup: Setup, sampler: ServerSampler, send: Callable[[], None]) -> str:
    """Compares the first prompts' tokens and log-probs; returns what came of it, in words. UsageError where a server
    has another tokenizer or other weights, or returns log-probs of another distribution than it draws from.

    A server that replaces its weights in place may keep some, such as a copy that it packed when it started, and after
    an update in training that is too little to be told from rounding. So it is sent a policy with much of each
    weight halved, which changes all log-probs and is exact, and then, by `send` as well, the policy itself.
    """
    differences = []
    own, rounded = score(setup)
    for server in sampler.servers:
        where, probes = f"{server.url} ({sampler.model_name})", probe(setup, sampler, server)
        if isinstance(probes, str):
            return f"note: {where} was not compared with the policy: {probes}"
        check_tokens(setup, where, probes)
        gap, bound = compare(probes, own, rounded)
        if not gap <= bound:
            raise UsageError(
                f"{where} has other weights than the policy: its log-probs of {len(probes)} prompts differ by "
                f"{gap:.3g} nats a token on average, and bf16 explains {bound:.3g}. Have it serve "
                f"{setup.policy.model.name_or_path}, or pass weight_sync, so that the policy's weights are sent to it"
            )
        differences.append(f"{server.url} has the policy's tokens and weights: log-probs differ by {gap:.2g} nats")
    if sampler.way is not None and sampler.way.replaces:
        try:
            with halved(setup.policy):
                send()
                check_arrival(setup, sampler)
        finally:
            send()
    return f"{'; '.join(differences)} (bf16: up to {bound:.2g})"


def check_arrival(setup: Setup, sampler: ServerSampler) -> None:
    """UsageError where a server has not all of a policy of other weights."""
    own, rounded = score(setup)
    for server in sampler.servers:
        probes = probe(setup, sampler, server)
        if isinstance(probes, str):
            raise UsageError(f"{server.url} could not be compared with a policy that it was sent: {probes}")
        gap, bound = compare(probes, own, rounded)
        if not gap <= bound:
            raise UsageError(
                f"weight_sync {setup.config.weight_sync}: {server.url} does not take all weights that are sent to it: "
                f"of a policy that was sent to try it, its log-probs of {len(probes)} prompts differ by {gap:.3g} nats "
                f"a token on average, and bf16 explains {bound:.3g}, so that it would draw from a mixture of old and "
                "new weights. Train an adapter, which replaces none: pass use_peft and weight_sync lora"
            )


@contextmanager
def halved(module: nn.Module) -> Iterator[None]:
    """Half of each weight within the block, and a quarter in every other column, as norms undo what is even: exact, but
    of fp16's smallest numbers, so that fp16 stays as it is. Of SmolLM2-135M on vLLM the log-probs then differ by 0.012
    nats, and by 1.3 or more where the head, the norms, the attention, the MLPs or one layer did not arrive."""
    scale(module, 0.5)
    try:
        yield
    finally:
        scale(module, 2.0)


@torch.no_grad()
def scale(module: nn.Module, factor: float) -> None:
    reshard(module)
    for weight in module.parameters():
        if weight.dtype in (torch.float32, torch.bfloat16):
            part = local(weight).mul_(factor)
            part[..., ::2].mul_(factor)


def compare(probes: list[Probe], own: Tensor, rounded: Tensor) -> tuple[float, float]:
    """The mean difference of a server's log-probs from the policy's, and the largest that bf16 explains, nats."""
    theirs = torch.tensor([value for probe in probes for value in probe.logprobs])
    rounding = (rounded - own).abs().mean().item()
    return (theirs - own).abs().mean().item(), TIMES * max(rounding, ROUNDING_NATS)


def check_tokens(setup: Setup, where: str, probes: list[Probe]) -> None:
    temperature = setup.config.temperature
    for prompt, one in zip(setup.prompts, probes, strict=False):
        if one.ids != prompt.ids:
            raise UsageError(
                f"{where} has another tokenizer than the policy: of {prompt.text[:60]!r} it makes the tokens "
                f"{one.ids[:8]}..., and the policy's makes {prompt.ids[:8]}... Have it serve the policy's own folder"
            )
        if temperature != 1 and not one.is_processed:
            raise UsageError(
                f"{where} returns log-probs from before the temperature of {temperature:g}, so that they are not those "
                "of its draws: start it with --logprobs-mode processed_logprobs, as rlhf serve-vllm does"
            )


def probe(setup: Setup, sampler: ServerSampler, server: Server) -> list[Probe] | str:
    """The server's view of the prompts, or the reason where it has none; the main process's, so that all decide
    alike."""
    probes: list[Probe] | str | None = None
    if setup.accelerator.is_main_process:
        requests = [request_of(prompt, setup.config.dataset_name) for prompt in setup.prompts[:PROMPTS]]
        try:
            probes = [sampler.probe(request, server) for request in requests]
        except RequestError as problem:
            probes = str(problem)
    return broadcast_object_list([probes])[0]


@torch.no_grad()
def score(setup: Setup) -> tuple[Tensor, Tensor]:
    """The policy's log-probs of the prompts' tokens but the first of each, as it trains and in bf16."""
    policy, as_trained = setup.policy, setup.policy.bf16
    episodes = [Episode(0, prompt.ids[:1], prompt.ids[1:], False, 0.0, None) for prompt in setup.prompts[:PROMPTS]]
    batch = batch_of(episodes, setup.pad_id).to(setup.accelerator.device)

    def logprobs() -> Tensor:
        output = forward(policy, batch, 1.0)
        return output.logprobs[output.mask].float().cpu()

    own = logprobs()
    policy.bf16 = True
    try:
        return own, logprobs()
    finally:
        policy.bf16 = as_trained
