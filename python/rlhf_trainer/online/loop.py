"""Learning from the model's own completions: the loop of `rlhf ppo` and `rlhf grpo`.

`run_iteration` is one iteration from top to bottom: sample completions, reward them, score them with the policy, its
reference and its values, turn rewards into advantages, and learn from these in one or several optimizer steps. What
tells PPO from GRPO, advantages and loss, is in ppo.py and grpo.py; the steps before are in collect.py and episodes.py.
"""

import math
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from torch import nn

from ..data.examples import Prompt
from ..models.loading import save_result
from ..rewards.rewards import Scores
from ..rollouts.generation import Completion, completion_text
from ..rollouts.loading import make_sampler
from ..rollouts.sampler import Failure
from ..rollouts.server import ServerSampler
from ..rollouts.weight_sync import POLICY_FOLDER
from ..training.batch_plan import epoch_order
from ..training.journal import write_jsonl
from ..training.loop import Run
from ..training.optimizers import check_warmup
from ..training.task import Metrics
from .advantages import adapted_beta
from .algorithm import Algorithm, EpisodeTask
from .collect import (
    complete_groups,
    compute_rewards,
    forget_failures,
    make_episodes,
    plan_mini_batches,
    prompts_of_step,
    report_failures,
    seed_of,
)
from .episodes import score_episodes
from .metrics import length_metrics, means_of_updates, reward_metrics, rollout_metrics
from .rollout_queue import Rollouts, make_rollouts
from .server_check import check_server
from .setup import Setup, data_checksum

SAMPLES_FILE = "samples.jsonl"
SAMPLES = 8  # completions of an evaluation that are kept for a person to read
WATCHED = ("reward", "objective/kl", "completions/mean_length", "seconds")


def train_online(setup: Setup, module: nn.Module, algorithm: Algorithm) -> Path:
    """Trains `module`, of which `setup.policy` is a part, or the whole; returns the folder that holds the policy."""
    config, accelerator, policy = setup.config, setup.accelerator, setup.policy
    prompts_each = config.batch_size // config.num_generations
    total = config.max_steps or math.ceil(len(setup.prompts) * config.num_train_epochs / prompts_each)
    check_warmup(config, total)
    sampler = make_sampler(config, policy.model, setup.tokenizer)  # before output_dir is made: a server may be down
    with (
        Run(config, module, accelerator, total, lambda: data_checksum(setup)) as run,
        closing(make_rollouts(setup, run, sampler)) as rollouts,
    ):
        beta = run.state.get("beta", config.beta)
        if accelerator.is_main_process:
            forget_failures(run.work, run.done)
        run.log.write(
            f"{len(setup.prompts)} prompts; {total} iterations of {prompts_each} prompts x {config.num_generations} "
            f"completions, which is {total * prompts_each / len(setup.prompts):.3g} epochs; metrics in "
            f"{run.work / 'metrics.jsonl'}"
        )
        if config.use_vllm and config.weight_sync == "none":
            run.log.write(
                "note: weight_sync is none: completions stay those of the server's own model, however far the policy "
                "moves; sampling/kl tells how far"
            )

        if isinstance(sampler, ServerSampler):
            rollouts.send()
            run.log.write(check_server(setup, sampler, rollouts.send))
        rollouts.follow(run.done)
        if setup.held_out and not run.done:
            run.log.log(0, 0.0, evaluate(setup, run, rollouts, step=0))
        for step in range(run.done + 1, total + 1):
            if run.best.is_over:
                break
            started = time.perf_counter()
            rollouts.follow(step - 1)
            metrics, beta = run_iteration(setup, run, rollouts, algorithm, step, beta)
            metrics["seconds"] = time.perf_counter() - started
            if isinstance(sampler, ServerSampler):
                metrics |= sampler.metrics()
            if setup.held_out and (step == total or step % (config.eval_steps or total) == 0):
                rollouts.follow(step)
                metrics |= evaluate(setup, run, rollouts, step)
            run.log.log(step, step * prompts_each / len(setup.prompts), metrics, WATCHED)
            run.judge(step, metrics)
            run.save_checkpoint(step, beta=beta)
        run.restore_best()

    def save(_module: nn.Module, folder: Path) -> None:
        shutil.rmtree(folder / POLICY_FOLDER, ignore_errors=True)
        save_result(policy.model, setup.tokenizer, folder, config)

    return run.finish(save)


def run_iteration(
    setup: Setup, run: Run, rollouts: Rollouts, algorithm: Algorithm, step: int, beta: float
) -> tuple[Metrics, float]:
    """One iteration; returns its metrics and the next iteration's beta, the strength of the KL penalty."""
    config = setup.config
    seed = seed_of(config, step)

    # Sample num_generations completions of each of the iteration's prompts.
    prompts = prompts_of_step(setup, step)
    samples, drawn = rollouts.take(step)
    report_failures(setup, samples, run.work, step)
    prompts, completions = complete_groups(config, prompts, samples)
    drawn["rollouts/failed"] = float(len(samples) - len(completions))
    if not completions:  # each prompt lacks one: nothing to compare, and nothing to learn in this iteration
        return drawn, beta

    # Reward them.
    scores = compute_rewards(setup, prompts, completions)
    if not setup.held_out:
        save_samples(setup, prompts, completions, scores, run.work)
    episodes = make_episodes(prompts, completions, scores)

    # Score each token with the policy before its update, its reference and its values, in the micro-batches in which
    # the policy will learn from them.
    idle = algorithm.idle(episodes, beta)
    plan = plan_mini_batches(setup, episodes, range(len(episodes)), seed, idle)
    if algorithm.needs_scores(beta):
        micro_batches = [micro_batch for batch in plan for micro_batch in batch]
        episodes = score_episodes(setup, run.unwrapped, episodes, micro_batches, with_reference=beta != 0)

    # Turn rewards, KL and values into advantages.
    episodes, advantage_metrics = algorithm.compute_advantages(episodes, beta)
    if config.mask_truncated_completions:
        finished = [i for i, episode in enumerate(episodes) if episode.finished]
        plan = plan_mini_batches(setup, episodes, finished, seed, idle)

    # Learn from them: an optimizer step for each mini-batch, in one or several passes.
    task = EpisodeTask(setup, algorithm, episodes, plan, beta)
    updates = []
    for number in range(algorithm.passes):
        for index in epoch_order(len(plan), seed, number):
            update_metrics, _ = run.update(task, plan[index], step)
            updates.append(update_metrics)

    metrics = rollout_metrics(task.episodes, scores, setup.reward_names, config, beta) | advantage_metrics
    metrics |= means_of_updates(updates) | task.mismatch() | drawn
    if config.target_kl is not None:
        beta = adapted_beta(beta, metrics["objective/kl"], config.target_kl, config.kl_gain)
    return metrics, beta


def evaluate(setup: Setup, run: Run, rollouts: Rollouts, step: int) -> Metrics:
    """Rewards and lengths of a completion of each held-out prompt, the same draws every time; some are kept."""
    seed = random.Random(f"{setup.config.seed}, evaluation").getrandbits(48)
    samples = rollouts.sample(setup.held_out, seed, str(setup.config.eval_dataset))
    report_failures(setup, samples, run.work, step)
    done = [k for k, sample in enumerate(samples) if not isinstance(sample, Failure)]
    prompts, completions = [setup.held_out[k] for k in done], [samples[k] for k in done]
    scores = compute_rewards(setup, prompts, completions)
    save_samples(setup, prompts, completions, scores, run.work)
    metrics = reward_metrics(scores, setup.reward_names) | length_metrics(make_episodes(prompts, completions, scores))
    metrics["rollouts/failed"] = float(len(samples) - len(done))
    return {f"eval/{name}": value for name, value in metrics.items()}


def save_samples(
    setup: Setup, prompts: Sequence[Prompt], completions: Sequence[Completion], scores: Scores, work: Path
) -> None:
    """Writes the first completions of the last evaluation, or without one of the last iteration, for a person."""
    if setup.accelerator.is_main_process:
        rows = zip(prompts[:SAMPLES], completions[:SAMPLES], scores.total.tolist()[:SAMPLES], strict=True)
        lines = [
            {
                "row": prompt.row, "prompt": prompt.prompt,
                "completion": completion_text(setup.tokenizer, completion, prompt.ids), "reward": reward,
            }
            for prompt, completion, reward in rows
        ]  # fmt: skip
        write_jsonl(work / SAMPLES_FILE, lines)
