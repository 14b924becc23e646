"""Where an iteration's completions come from: drawn when they are wanted, by the policy as it is then, or by a server
while earlier iterations train, by a policy that is up to max_off_policy_steps older."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from accelerate.utils import broadcast_object_list

from ..data.examples import Prompt
from ..errors import UsageError
from ..rollouts.generation import Completion
from ..rollouts.sampler import Failure, Sampler
from ..rollouts.server import ServerSampler
from ..rollouts.weight_sync import POLICY_FOLDER
from ..training.fsdp import unsharded
from ..training.loop import Run
from ..training.task import Metrics
from .collect import draw_from_server, prompts_of_step, sample_completions, seed_of
from .setup import Setup

Samples = list[Completion | Failure]


class Rollouts:
    """The completions of an iteration are drawn when they are wanted. Used in all processes alike."""

    def __init__(self, setup: Setup, run: Run, sampler: Sampler) -> None:
        self.setup, self.run, self.sampler = setup, run, sampler

    def send(self) -> None:
        """Has the sampler's next completions come from the policy as it is now."""
        with unsharded(self.run.model):
            if self.setup.accelerator.is_main_process:
                self.sampler.sync(self.setup.policy.model, self.setup.tokenizer, self.run.work / POLICY_FOLDER)
            self.setup.accelerator.wait_for_everyone()

    def follow(self, step: int) -> None:
        """The policy has trained for `step` iterations."""
        self.send()

    def take(self, step: int) -> tuple[Samples, Metrics]:
        """The completions of an iteration's prompts, and what is to be known about how they were drawn."""
        config = self.setup.config
        return self.sample(prompts_of_step(self.setup, step), seed_of(config, step), config.dataset_name), {}

    def sample(self, prompts: Sequence[Prompt], seed: int, source: str) -> Samples:
        """Completions by the policy that was followed last."""
        with unsharded(self.run.model):
            return sample_completions(self.setup, self.sampler, prompts, seed, source)

    def close(self) -> None:
        """No more completions are wanted."""


class Drawn(NamedTuple):
    """An iteration's completions, and the number of iterations that the policy which drew them had trained for."""

    samples: Samples
    version: int
    idle_seconds: float  # of the servers, before they began
    seconds: float


class RolloutQueue(Rollouts):
    """A thread of the main process has servers draw the completions of one iteration after the other, each by the
    newest policy that there is when its turn comes. All tokens of an iteration are of one policy, as weights travel in
    between.

    What is drawn and not trained on when a run is killed is drawn anew, by a newer policy, when it is resumed, so that
    no prompt is lost and none comes twice.
    """

    sampler: ServerSampler

    def __init__(self, setup: Setup, run: Run, sampler: ServerSampler) -> None:
        super().__init__(setup, run, sampler)
        self.thread = ThreadPoolExecutor(1)
        self.drawn: dict[int, Future[Drawn]] = {}
        self.wanted = run.done  # the last iteration whose completions the thread is to draw
        self.newest, self.served = (-1, ""), -1  # the newest policy and its copy; the one that servers have
        self.ended = time.perf_counter()

    def follow(self, step: int) -> None:
        if step == self.newest[0]:
            return
        is_main, model, saved = self.setup.accelerator.is_main_process, self.setup.policy.model, ""
        with unsharded(self.run.model):
            if is_main:
                saved = self.sampler.save(model, self.setup.tokenizer, self.run.work / POLICY_FOLDER)
        self.newest = step, saved
        if not is_main:
            return
        last = min(self.run.total, step + 1 + self.setup.config.max_off_policy_steps)
        for number in range(self.wanted + 1, last + 1):
            self.drawn[number] = self.thread.submit(self._draw, number)
        self.wanted = max(self.wanted, last)

    def take(self, step: int) -> tuple[Samples, Metrics]:
        started, results = time.perf_counter(), [None, None]
        if self.setup.accelerator.is_main_process:
            one = self.drawn.pop(step).result()
            if self.setup.config.vllm_importance_sampling_correction and not any(map(has_logprobs, one.samples)):
                raise UsageError(
                    "max_off_policy_steps: the servers return no log-probs of what they draw, by which an older "
                    "policy's completions are weighed. Take a server that does, or leave max_off_policy_steps out"
                )
            metrics = {
                "off_policy_steps": float(step - 1 - one.version), "draw_seconds": one.seconds,
                "idle_seconds": one.idle_seconds, "wait_seconds": time.perf_counter() - started,
            }  # fmt: skip
            results = [one.samples, {f"rollouts/{name}": value for name, value in metrics.items()}]
        samples, metrics = broadcast_object_list(results)
        return samples, metrics

    def sample(self, prompts: Sequence[Prompt], seed: int, source: str) -> Samples:
        def draw() -> Samples:
            self._load()
            samples = draw_from_server(self.setup, self.sampler, prompts, seed, source)
            self.ended = time.perf_counter()
            return samples

        is_main = self.setup.accelerator.is_main_process
        return broadcast_object_list([self.thread.submit(draw).result() if is_main else None])[0]

    def _draw(self, step: int) -> Drawn:
        config, began, ended = self.setup.config, time.perf_counter(), self.ended
        self._load()
        prompts = prompts_of_step(self.setup, step)
        samples = draw_from_server(self.setup, self.sampler, prompts, seed_of(config, step), config.dataset_name)
        self.ended = time.perf_counter()
        return Drawn(samples, self.served, began - ended, self.ended - began)

    def _load(self) -> None:
        """Has the servers take the newest policy, if they have it not."""
        version, saved = self.newest
        if version != self.served:
            self.sampler.load(saved)
            self.served = version

    def close(self) -> None:
        self.sampler.stop()
        self.thread.shutdown(wait=False, cancel_futures=True)


def has_logprobs(sample: Completion | Failure) -> bool:
    return isinstance(sample, Failure) or sample.logprobs is not None


def make_rollouts(setup: Setup, run: Run, sampler: Sampler) -> Rollouts:
    if setup.config.max_off_policy_steps and isinstance(sampler, ServerSampler):
        return RolloutQueue(setup, run, sampler)
    return Rollouts(setup, run, sampler)
