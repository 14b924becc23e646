"""Learning from the model's own completions: the loop that `rlhf ppo` and `rlhf grpo` share.

An iteration draws completions, rewards them, looks at them with the policy, its reference and its values, turns
rewards into advantages, and learns from them in one or several optimizer steps. The algorithm says two things: what
credit a completion's tokens get (`credit`), and what their loss is (`task`).
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ..data.examples import Prompt
from ..models.kl import states_of
from ..rewards.rewards import Scores
from ..rollouts.generation import Completion, completion_text
from ..rollouts.sampler import Failure, Sampler, make_sampler, mismatch
from ..training.batch_plan import MicroBatch, epoch_order
from ..training.journal import write_jsonl
from ..training.loop import Run, Task
from ..training.output_folder import save_model
from .collect import (
    complete_groups,
    draw,
    episodes_of,
    forget_failures,
    judge,
    plan_of,
    prompts_of_step,
    report_failures,
)
from .config import OnlineConfig
from .episodes import Episode, Seen, batch_of, looked_at, padded, see, unpadded
from .kl_control import adapted
from .metrics import length_metrics, means_of_updates, reward_metrics, rollout_metrics
from .setup import Setup, digest

SAMPLES_FILE = "samples.jsonl"
SAMPLES = 8  # how many completions a person is shown of an evaluation
POLICY_FOLDER = "policy"  # where a server finds the policy


class Credited(NamedTuple):
    """Episodes with advantages, and what is to be logged of them."""

    episodes: list[Episode]
    metrics: dict[str, float]


class Algorithm(Protocol):
    """PPO, GRPO. `beta` is the strength of the KL penalty in this iteration."""

    needs_values: bool

    def credit(self, config: OnlineConfig, episodes: list[Episode], beta: float) -> Credited: ...

    def task(self, setup: Setup, episodes: list[Episode], plan: list[list[MicroBatch]], beta: float) -> OnlineTask: ...


class OnlineTask(Task):
    """Episodes of one iteration, each with its advantages."""

    noun = "completions"
    kl_name: str  # of the metric, where the KL is in the loss

    def __init__(
        self, setup: Setup, episodes: list[Episode], plan: list[list[MicroBatch]], counts: Sequence[float], beta: float
    ) -> None:
        super().__init__(plan, counts, setup.accelerator.device)
        self.setup, self.config, self.episodes, self.beta = setup, setup.config, episodes, beta
        self.has_kl = beta != 0 and setup.config.kl_in == "loss"
        if self.has_kl:
            self.names = (*self.names, self.kl_name)

    def examples(self, indices: MicroBatch) -> list[Any]:
        return [self.episodes[i].told() for i in indices]

    def see(self, model: nn.Module, indices: MicroBatch) -> tuple[list[Episode], Seen, Tensor | None]:
        """The episodes, what the model makes of them, and their KL [S, T - 1] with a gradient, if the loss has it."""
        config, part = self.config, [self.episodes[i] for i in indices]
        batch = batch_of(part, self.setup.pad_id).to(self.device)
        states = None
        if self.has_kl and config.kl_estimator == "exact":
            with torch.no_grad():
                states = states_of(self.setup.reference, batch)
        seen = see(model, batch, config.temperature, states)
        if not self.has_kl or states is not None:
            return part, seen, seen.kl
        ref_logprobs = self.padded("ref_logprobs", part, seen.mask)
        return part, seen, rk.kl_penalty(seen.logprobs, ref_logprobs, config.kl_estimator)

    def old_logprobs(self, indices: MicroBatch, seen: Seen) -> Tensor:
        """Of the policy that drew the episodes; where it learns from them once, its own, which are kept."""
        part = [self.episodes[i] for i in indices]
        old = self.padded("logprobs", part, seen.mask)
        if old is None:
            old = seen.logprobs.detach()
            found = unpadded(old, seen.mask, [len(episode.ids) for episode in part])
            for i, episode, logprobs in zip(indices, part, found, strict=True):
                self.episodes[i] = episode._replace(logprobs=logprobs)
        return old

    def padded(self, name: str, part: list[Episode], mask: Tensor) -> Tensor | None:
        """This field of the episodes, as `episodes.padded`."""
        return padded([getattr(episode, name) for episode in part], mask)

    def tokens_of(self, part: list[Episode]) -> Tensor:
        return torch.tensor(sum(episode.length for episode in part), device=self.device)

    def mismatch(self) -> dict[str, float]:
        """Between the sampler's log-probs and the policy's, of this process' episodes."""
        both = [
            (episode.sampler_logprobs, episode.logprobs)
            for episode in self.episodes
            if episode.sampler_logprobs is not None and episode.logprobs is not None
        ]
        return mismatch(*(torch.cat(side) for side in zip(*both, strict=True))) if both else {}


def train_online(setup: Setup, module: nn.Module, algorithm: Algorithm) -> Path:
    """Trains `module`, of which `setup.policy` is a part, or the whole; returns the folder that holds the policy."""
    config, accelerator, policy = setup.config, setup.accelerator, setup.policy
    asked_each = config.batch_size // config.num_generations
    total = config.max_steps or math.ceil(len(setup.prompts) * config.num_train_epochs / asked_each)
    sampler = make_sampler(config, policy.model, setup.tokenizer)  # before output_dir is made: a server may be down
    with Run(config, module, accelerator, total, lambda: digest(setup)) as run:
        beta = run.facts.get("beta", config.beta)
        if accelerator.is_main_process:
            forget_failures(run.work, run.done)
        asked = f"{asked_each} prompts x {config.num_generations} completions"
        epochs = total * asked_each / len(setup.prompts)
        run.log.say(
            f"{len(setup.prompts)} prompts; {total} iterations of {asked}, which is {epochs:.3g} epochs; metrics in "
            f"{run.work / 'metrics.jsonl'}"
        )
        if config.server_url is not None and config.server_sync == "none":
            run.log.say(
                "note: server_sync is none: completions stay those of the server's own model, however far the policy "
                "moves; sampling/kl tells how far"
            )
        if setup.held_out and not run.done:
            run.log.log(0, 0.0, evaluate(setup, sampler, run.work, step=0))
        has_moved = run.done > 0
        for step in range(run.done + 1, total + 1):
            started = time.perf_counter()
            if has_moved:
                share_policy(setup, sampler, run.work / POLICY_FOLDER)
            metrics, beta = iterate(setup, run, sampler, algorithm, step, beta)
            has_moved = True
            metrics["seconds"] = time.perf_counter() - started
            if setup.held_out and (step == total or step % (config.eval_steps or total) == 0):
                share_policy(setup, sampler, run.work / POLICY_FOLDER)
                metrics |= evaluate(setup, sampler, run.work, step)
                has_moved = False
            run.log.log(step, step * asked_each / len(setup.prompts), metrics)
            run.log.advance(**{name: f"{metrics[name]:.4f}" for name in ("reward", "objective/kl") if name in metrics})
            run.keep(step, beta=beta)

    def save(_module: nn.Module, folder: Path) -> None:
        shutil.rmtree(folder / POLICY_FOLDER, ignore_errors=True)
        save_model(policy.model, setup.tokenizer, folder)

    return run.finish(save)


def iterate(
    setup: Setup, run: Run, sampler: Sampler, algorithm: Algorithm, step: int, beta: float
) -> tuple[dict[str, float], float]:
    """Draws, rewards, looks, gives credit and learns; returns the metrics and the next iteration's beta."""
    config = setup.config
    seed = random.Random(f"{config.seed}, iteration {step}").getrandbits(48)
    asked = prompts_of_step(setup, step)
    drawn = draw(setup, sampler, asked, seed, config.dataset)
    report_failures(setup, drawn, run.work, step)
    prompts, completions = complete_groups(config, asked, drawn)
    failed = {"rollouts/failed": float(len(drawn) - len(completions))}
    if not completions:  # each prompt lacks one: nothing to compare, and nothing to learn in this iteration
        return failed, beta
    judged = judge(setup, prompts, completions)
    if not setup.held_out:
        show_samples(setup, prompts, completions, judged, run.work)
    episodes = episodes_of(prompts, completions, judged)

    plan = plan_of(setup, episodes, seed)
    if config.reuses_completions or algorithm.needs_values or beta:
        micros = [micro for batch in plan for micro in batch]
        episodes = looked_at(
            episodes, micros, run.unwrapped, setup.reference if beta else None, setup.accelerator, pad_id=setup.pad_id,
            temperature=config.temperature, exact_kl=config.kl_estimator == "exact",
        )  # fmt: skip
    credited = algorithm.credit(config, episodes, beta)
    episodes = credited.episodes
    if config.mask_truncated_completions:
        episodes = [episode for episode in episodes if episode.finished]
        plan = plan_of(setup, episodes, seed)

    task = algorithm.task(setup, episodes, plan, beta)
    orders = [epoch_order(len(plan), seed, epoch) for epoch in range(config.num_ppo_epochs)]
    updates = [run.update(task, plan[index], step)[0] for order in orders for index in order]
    metrics = rollout_metrics(credited.episodes, judged, setup.rewards.names, config, beta) | credited.metrics
    metrics |= means_of_updates(updates) | task.mismatch()
    metrics |= failed
    if config.target_kl is not None:
        beta = adapted(beta, metrics["objective/kl"], config.target_kl, config.kl_gain)
    return metrics, beta


def share_policy(setup: Setup, sampler: Sampler, folder: Path) -> None:
    """The sampler's next completions are of the policy as it is now."""
    if setup.accelerator.is_main_process:
        sampler.sync(setup.policy.model, setup.tokenizer, folder)
    setup.accelerator.wait_for_everyone()


def evaluate(setup: Setup, sampler: Sampler, work: Path, step: int) -> dict[str, float]:
    """Rewards and lengths of a completion of each held-out prompt, the same draws every time; some are kept."""
    seed = random.Random(f"{setup.config.seed}, evaluation").getrandbits(48)
    drawn = draw(setup, sampler, setup.held_out, seed, str(setup.config.eval_dataset))
    report_failures(setup, drawn, work, step)
    done = [k for k, one in enumerate(drawn) if not isinstance(one, Failure)]
    prompts, completions = [setup.held_out[k] for k in done], [drawn[k] for k in done]
    judged = judge(setup, prompts, completions)
    show_samples(setup, prompts, completions, judged, work)
    episodes = episodes_of(prompts, completions, judged)
    found = reward_metrics(judged, setup.rewards.names) | length_metrics(episodes)
    found["rollouts/failed"] = float(len(drawn) - len(done))
    return {f"eval/{name}": value for name, value in found.items()}


def show_samples(
    setup: Setup, prompts: Sequence[Prompt], completions: Sequence[Completion], judged: Scores, work: Path
) -> None:
    """The first of the last evaluation, or without one of the last iteration, for a person to read."""
    if setup.accelerator.is_main_process:
        rows = zip(prompts[:SAMPLES], completions[:SAMPLES], judged.total.tolist()[:SAMPLES], strict=True)
        texts = [
            {"row": p.row, "prompt": p.prompt, "completion": completion_text(setup.tokenizer, c), "reward": reward}
            for p, c, reward in rows
        ]
        write_jsonl(work / SAMPLES_FILE, texts)
