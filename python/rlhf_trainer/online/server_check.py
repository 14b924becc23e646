"""Whether servers have the policy that trains: the same tokens, and the same log-probs as far as bf16 goes."""

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..data.examples import Prompt
from ..errors import UsageError
from ..rollouts.http_json import RequestError
from ..rollouts.sampler import request_of
from ..rollouts.server import Probe, ServerSampler
from .episodes import Episode, batch_of, forward
from .setup import Setup

PROMPTS = 4  # that are compared
# What bf16 moves a log-prob, on average, at least, as a policy that is in bf16 itself cannot measure it. From vLLM's
# SmolLM2-135M, the same in fp32 is 0.063 nats, in bf16 0.108, and with 3% of noise in its weights 0.43.
ROUNDING_NATS = 0.05
TIMES = 4  # as much as bf16 moves the policy's own log-probs: a server rounds more than autocast does


def check_server(setup: Setup, sampler: ServerSampler) -> str:
    """Compares the first prompts' tokens and log-probs; returns what came of it, in words. UsageError where the server
    has another tokenizer or other weights, or returns log-probs of another distribution than it draws from."""
    where, gaps, roundings = f"{sampler.servers[0].url} ({sampler.model_name})", [], []
    for prompt in setup.prompts[:PROMPTS]:
        probe = broadcast_object_list([probe_of(setup, sampler, prompt)])[0]  # so that processes decide alike
        if isinstance(probe, str):
            return f"note: {where} was not compared with the policy: {probe}"
        if probe.ids != prompt.ids:
            raise UsageError(
                f"{where} has another tokenizer than the policy: of {prompt.text[:60]!r} it makes the tokens "
                f"{probe.ids[:8]}..., and the policy's makes {prompt.ids[:8]}... Have it serve the policy's own folder"
            )
        if setup.config.temperature != 1 and not probe.is_processed:
            raise UsageError(
                f"{where} returns log-probs from before the temperature of {setup.config.temperature:g}, so that they "
                "are not those of its draws: start it with --logprobs-mode processed_logprobs, as rlhf serve-vllm does"
            )
        own, rounded = prompt_logprobs(setup, prompt.ids)
        gaps.append((torch.tensor(probe.logprobs) - own).abs())
        roundings.append((rounded - own).abs())
    gap, rounding = torch.cat(gaps).mean().item(), torch.cat(roundings).mean().item()
    bound = TIMES * max(rounding, ROUNDING_NATS)
    if not gap <= bound:
        raise UsageError(
            f"{where} has other weights than the policy: its log-probs of {len(gaps)} prompts differ by {gap:.3g} nats "
            f"a token on average, and bf16 explains {bound:.3g}. Have it serve {setup.policy.model.name_or_path}, or "
            "pass weight_sync, so that the policy's weights are sent to it"
        )
    return f"{where} has the policy's tokens and weights: log-probs differ by {gap:.2g} nats (bf16: up to {bound:.2g})"


def probe_of(setup: Setup, sampler: ServerSampler, prompt: Prompt) -> Probe | str | None:
    """The server's view of a prompt, in the main process; the reason where it has none."""
    if not setup.accelerator.is_main_process:
        return None
    try:
        return sampler.probe(request_of(prompt, setup.config.dataset_name))
    except RequestError as problem:
        return str(problem)


@torch.no_grad()
def prompt_logprobs(setup: Setup, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The policy's log-probs of all tokens but the first, as it trains and in bf16; [T - 1] each."""
    policy, as_trained = setup.policy, setup.policy.bf16
    batch = batch_of([Episode(0, ids[:1], ids[1:], False, 0.0, None)], setup.pad_id).to(setup.accelerator.device)
    own = forward(policy, batch, 1.0).logprobs[0]
    policy.bf16 = True
    try:
        rounded = forward(policy, batch, 1.0).logprobs[0]
    finally:
        policy.bf16 = as_trained
    return own.float().cpu(), rounded.float().cpu()
