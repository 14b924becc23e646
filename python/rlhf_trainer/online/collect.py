"""An iteration's completions: its prompts, the sampler's completions of them, and their rewards."""

import json
import math
import random
from collections.abc import Sequence, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.examples import Prompt
from ..errors import UsageError
from ..rewards.rewards import Scores
from ..rollouts.generation import Completion, Sampling, completion_text
from ..rollouts.sampler import Failure, Sampler, request_of
from ..rollouts.server import ServerSampler
from ..training.batch_plan import MicroBatch, plan_batches
from ..training.fsdp import unsharded
from ..training.journal import batches_of_like_length, whole_lines, write_jsonl
from ..training.memory import lack_of_memory
from ..training.processes import over_processes
from .config import OnlineConfig
from .episodes import Episode
from .setup import Setup

FAILURES_FILE = "failures.jsonl"


def prompts_of_step(setup: Setup, step: int) -> list[Prompt]:
    """The iteration's prompts, each num_generations times. Every epoch is a shuffle of its own; they follow each other
    without a break, so that all iterations are equally large."""
    count, each = len(setup.prompts), setup.config.num_generations
    per_step = setup.config.batch_size // each
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range((step - 1) * per_step, step * per_step):
        epoch, position = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = random.Random(f"{setup.config.seed}, prompts {epoch}").sample(range(count), count)
        chosen += [setup.prompts[orders[epoch][position]]] * each
    return chosen


def sampling_of(config: OnlineConfig) -> Sampling:
    return Sampling(config.max_completion_length, config.temperature)


def seed_of(config: OnlineConfig, step: int) -> int:
    """The seed of an iteration's draws."""
    return random.Random(f"{config.seed}, iteration {step}").getrandbits(48)


def draw_from_server(
    setup: Setup, sampler: ServerSampler, prompts: Sequence[Prompt], seed: int, source: str
) -> list[Completion | Failure]:
    """As `sample_completions`, known to this process alone."""

    def draw(prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> list[Completion | Failure]:
        requests = [request_of(prompt, source) for prompt in prompts]
        return sampler.generate(requests, sampling, seed=seed, number=0)

    if setup.environment is None:
        return draw(prompts, seed, sampling_of(setup.config))
    return setup.environment.play(prompts, seed, sampling_of(setup.config), draw, lambda own: own, is_main=True)


def sample_completions(
    setup: Setup, sampler: Sampler, prompts: Sequence[Prompt], seed: int, source: str
) -> list[Completion | Failure]:
    """A completion of each of the prompts, which are from `source`, known to every process; only the main one sends
    requests to a server."""
    is_main, sampling = setup.accelerator.is_main_process, sampling_of(setup.config)

    def share(own: Any) -> Any:
        return broadcast_object_list([own])[0]

    if isinstance(sampler, ServerSampler):
        return share(draw_from_server(setup, sampler, prompts, seed, source) if is_main else None)
    draw = partial(draw_here, setup, sampler, source)
    if setup.environment is None:
        return draw(prompts, seed, sampling)
    return setup.environment.play(prompts, seed, sampling, draw, share, is_main=is_main)


def draw_here(
    setup: Setup, sampler: Sampler, source: str, prompts: Sequence[Prompt], seed: int, sampling: Sampling
) -> list[Completion | Failure]:
    """A completion of each prompt, by all processes together."""
    config, requests = setup.config, [request_of(prompt, source) for prompt in prompts]
    batches = batches_of_like_length([prompt.length for prompt in prompts], config.per_device_generation_batch_size)

    def generate(part: tuple[int, MicroBatch]) -> list[Completion | Failure]:
        number, positions = part
        with lack_of_memory(config, lambda: f"{len(positions)} completions generated at once"):
            return sampler.generate([requests[i] for i in positions], sampling, seed=seed, number=number)

    results = over_processes(list(enumerate(batches)), generate, setup.accelerator)
    by_position = {
        i: completion
        for positions, completions in zip(batches, results, strict=True)
        for i, completion in zip(positions, completions, strict=True)
    }
    return [by_position[i] for i in range(len(requests))]


def report_failures(setup: Setup, samples: Sequence[Completion | Failure], work: Path, step: int) -> None:
    """Prompts without a completion, in a file; UsageError where none has one."""
    failures = [failure for failure in samples if isinstance(failure, Failure)]
    if failures and setup.accelerator.is_main_process:
        with (work / FAILURES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **failure._asdict()}) + "\n" for failure in failures)
    if len(failures) == len(samples):
        raise UsageError(f"step {step}: no prompt was completed; {failures[0].where}: {failures[0].reason}")


def forget_failures(work: Path, after: int) -> None:
    """Drops the failures of iterations that a resumed run will repeat."""
    path = work / FAILURES_FILE
    if path.is_file():
        lines = [json.loads(line) for line in whole_lines(path)]
        write_jsonl(path, [line for line in lines if after and line["step"] <= after])


def complete_groups(
    config: OnlineConfig, prompts: Sequence[Prompt], samples: Sequence[Completion | Failure]
) -> tuple[list[Prompt], list[Completion]]:
    """The prompts all of whose completions are there, and these: a group is compared as a whole."""
    size = config.num_generations
    whole = [k for k in range(0, len(samples), size) if not any(isinstance(s, Failure) for s in samples[k : k + size])]
    positions = [i for k in whole for i in range(k, k + size)]
    return [prompts[i] for i in positions], [samples[i] for i in positions]


def compute_rewards(setup: Setup, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
    """The completions' rewards, known to every process; each scores some prompts with all their completions."""
    texts = [completion_text(setup.tokenizer, c, p.ids) for p, c in zip(prompts, completions, strict=True)]
    size = setup.config.num_generations * math.ceil(
        len(texts) / setup.config.num_generations / setup.accelerator.num_processes
    )
    parts = [range(k, min(k + size, len(texts))) for k in range(0, len(texts), size)]
    with ExitStack() as whole:  # processes may have different numbers of batches
        for reward in setup.rewards.models:
            whole.enter_context(unsharded(reward.model))
        scores = over_processes(
            parts, lambda part: setup.rewards([prompts[i] for i in part], [texts[i] for i in part]), setup.accelerator
        )
    total, parts = torch.cat([part.total for part in scores]), torch.cat([part.parts for part in scores])
    if setup.environment is None:
        return Scores(total, parts)
    own = torch.tensor([completion.reward for completion in completions])
    return Scores(total + own, torch.cat([parts, own[:, None]], dim=1))


def make_episodes(prompts: Sequence[Prompt], completions: Sequence[Completion], scores: Scores) -> list[Episode]:
    """The completions with their prompts and rewards; log-probs and advantages come later."""
    return [
        Episode(
            prompt.row, prompt.ids, completion.ids, completion.finished, reward,
            None if completion.logprobs is None else torch.tensor(completion.own(completion.logprobs)),
            learned=completion.learned,
        )
        for prompt, completion, reward in zip(prompts, completions, scores.total.tolist(), strict=True)
    ]  # fmt: skip


def plan_mini_batches(
    setup: Setup, episodes: Sequence[Episode], chosen: Sequence[int], seed: int, idle: Set[int]
) -> list[list[MicroBatch]]:
    """Mini-batches of micro-batches of the episodes at the places `chosen`; each mini-batch is an optimizer step.
    Those that are idle come first in it, so that they share micro-batches."""
    config = setup.config
    if not chosen:
        return []
    mini = math.ceil(len(chosen) / config.num_mini_batches)
    micro = min(config.micro_batch_size, math.ceil(mini / setup.accelerator.num_processes))
    plan = plan_batches([(i not in idle, episodes[i].length) for i in chosen], mini, micro, seed)
    return [[[chosen[k] for k in micro_batch] for micro_batch in batch] for batch in plan]
