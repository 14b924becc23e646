"""An iteration's completions: which prompts are asked, what the sampler makes of them, and what they are worth."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.examples import Prompt
from ..errors import UsageError
from ..rewards.rewards import Scores
from ..rollouts.generation import Completion, Sampling, completion_text
from ..rollouts.sampler import Asked, Failure, Sampler
from ..training.batch_plan import MicroBatch, plan_batches
from ..training.journal import batches_of_like_length, whole_lines, write_jsonl
from .config import OnlineConfig
from .episodes import Episode, over_processes
from .setup import Setup

FAILURES_FILE = "failures.jsonl"


def prompts_of_step(setup: Setup, step: int) -> list[Prompt]:
    """The iteration's prompts, each num_generations times. Every epoch is a shuffle of its own; they follow each other
    without a break, so that all iterations are equally large."""
    count, each = len(setup.prompts), setup.config.num_generations
    taken = setup.config.batch_size // each
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range((step - 1) * taken, step * taken):
        epoch, position = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = random.Random(f"{setup.config.seed}, prompts {epoch}").sample(range(count), count)
        chosen += [setup.prompts[orders[epoch][position]]] * each
    return chosen


def draw(
    setup: Setup, sampler: Sampler, prompts: Sequence[Prompt], seed: int, source: str
) -> list[Completion | Failure]:
    """One completion for each of the prompts, which are of `source`, known to every process; a server is asked by the
    main one only."""
    config = setup.config
    asked = [Asked(prompt.ids, prompt.prompt, f"{source}, row {prompt.row}") for prompt in prompts]
    sampling = Sampling(config.max_new_tokens, config.temperature)
    if config.server_url is not None:
        found = [sampler.generate(asked, sampling, seed=seed, number=0) if setup.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]
    batches = batches_of_like_length([prompt.length for prompt in prompts], config.generation_batch_size)

    def write(part: tuple[int, MicroBatch]) -> list[Completion | Failure]:
        number, positions = part
        return sampler.generate([asked[i] for i in positions], sampling, seed=seed, number=number)

    drawn: list[Any] = [None] * len(asked)
    for positions, completions in zip(
        batches, over_processes(list(enumerate(batches)), write, setup.accelerator), strict=True
    ):
        for i, completion in zip(positions, completions, strict=True):
            drawn[i] = completion
    return drawn


def report_failures(setup: Setup, drawn: Sequence[Completion | Failure], work: Path, step: int) -> None:
    """Prompts that the sampler gave up on, in a file; UsageError where it gave up on all. At an iteration's end, those
    of the evaluation."""
    failures = [failure for failure in drawn if isinstance(failure, Failure)]
    if failures and setup.accelerator.is_main_process:
        with (work / FAILURES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **failure._asdict()}) + "\n" for failure in failures)
    if len(failures) == len(drawn):
        raise UsageError(f"step {step}: no prompt was completed; {failures[0].where}: {failures[0].reason}")


def forget_failures(work: Path, after: int) -> None:
    """Those of iterations that a run which goes on will repeat."""
    path = work / FAILURES_FILE
    if path.is_file():
        lines = [json.loads(line) for line in whole_lines(path)]
        write_jsonl(path, [line for line in lines if after and line["step"] <= after])


def complete_groups(
    config: OnlineConfig, prompts: Sequence[Prompt], drawn: Sequence[Completion | Failure]
) -> tuple[list[Prompt], list[Completion]]:
    """Those prompts all of whose completions are there: a group is compared as a whole."""
    size = config.num_generations
    whole = [k for k in range(0, len(drawn), size) if not any(isinstance(one, Failure) for one in drawn[k : k + size])]
    positions = [i for k in whole for i in range(k, k + size)]
    return [prompts[i] for i in positions], [drawn[i] for i in positions]


def judge(setup: Setup, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
    """Their rewards, known to every process; each process judges some prompts with all their completions."""
    texts = [completion_text(setup.tokenizer, completion) for completion in completions]
    size = setup.config.num_generations * math.ceil(
        len(texts) / setup.config.num_generations / setup.accelerator.num_processes
    )
    parts = [range(k, min(k + size, len(texts))) for k in range(0, len(texts), size)]
    found = over_processes(
        parts, lambda part: setup.rewards([prompts[i] for i in part], [texts[i] for i in part]), setup.accelerator
    )
    return Scores(torch.cat([scores.total for scores in found]), torch.cat([scores.parts for scores in found]))


def episodes_of(prompts: Sequence[Prompt], completions: Sequence[Completion], judged: Scores) -> list[Episode]:
    return [
        Episode(
            prompt.row, prompt.ids, completion.ids, completion.finished, reward,
            None if completion.logprobs is None else torch.tensor(completion.logprobs),
        )
        for prompt, completion, reward in zip(prompts, completions, judged.total.tolist(), strict=True)
    ]  # fmt: skip


def plan_of(setup: Setup, episodes: Sequence[Episode], seed: int) -> list[list[MicroBatch]]:
    """Mini-batches of micro-batches."""
    config = setup.config
    if not episodes:
        return []
    mini = math.ceil(len(episodes) / config.num_mini_batches)
    micro = min(config.micro_batch_size, math.ceil(mini / setup.accelerator.num_processes))
    return plan_batches([episode.length for episode in episodes], mini, micro, seed)
