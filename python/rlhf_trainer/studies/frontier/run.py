"""`rlhf frontier`: how far each method comes from the best that is possible, with nothing sampled.

The language and its hidden reward are in language.py. It is so small that a policy's mean reward and its KL
from the reference are sums over all completions (exact.py), and so is the policy that no other can beat. The methods
are those of methods.py; every training is one job, whose result is kept in a file as soon as it is
known. The results, and whether they are as expected, are in frontier.json and report.txt.
"""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from ...data.encoding import Codec, encode_prompt
from ...errors import TrainingError, UsageError
from ...models.loading import load_causal_lm, load_tokenizer
from ...models.scoring import load_reward_model
from ...training.files import write_whole
from ...training.output_folder import begin, commit_output, open_output
from ..config import FrontierConfig
from ..machine import commit, environment
from .exact import best_of, bound_on_best_of, draw, effective_sample_size, leaf_logprobs, optimum, reward_at, value_of
from .language import leaf_rewards
from .methods import METHODS, QUICK, REWARD_MODEL, WHOLE, Method, World, make_world
from .overoptimisation import agreement, curve, peak, proxy_rewards
from .plots import draw_frontier, draw_overoptimisation
from .report import report_of

FRONTIER_BETAS = tuple(20.0 * 0.87**step for step in range(46))  # down to 0.04
BEST_OF = tuple(2**power for power in range(14))  # up to 8192
IMPORTANCE_BETAS, DRAWS = (0.1, 0.2, 0.5, 1.0, 2.0), 100_000
LEAVES_FILE = "leaves.safetensors"


class Job(NamedTuple):
    """One training, and what is measured of its result."""

    method: Method
    strength: float
    seed: int

    @property
    def name(self) -> str:
        words = self.method.name.replace("+", "").split()
        return f"{'-'.join(words).lower()}-{self.strength:g}-seed{self.seed}"


class Truth(NamedTuple):
    """The held-out prompts' ids, and all leaves' log-probs under the reference and hidden rewards."""

    prompts: list[list[int]]
    ref_logprobs: Tensor  # [prompts, leaves]
    rewards: Tensor


def run(config: FrontierConfig) -> Path:
    """Writes frontier.json, report.txt and the pictures into output_dir, which it returns."""
    if not begin(config):
        return Path(config.output_dir)
    torch.set_num_threads(1)  # matrices this small are done before a second thread has woken up
    work = open_output(config)
    started = time.perf_counter()
    sizes = QUICK if config.quick else WHOLE
    with quiet(work / "reference.log"):
        world = make_world(work / "world", sizes, config.seed)
        truth = truth_of(world, work / LEAVES_FILE)
    print(f"the reference model knows the language; {sizes.held_out} prompts are held out")

    counts = [(method, config.seeds) for method in METHODS] + [(REWARD_MODEL, config.reward_model_seeds)]
    jobs = [
        Job(method, strength, config.seed + 1 + number)
        for method, count in counts
        for strength in method.strengths(sizes)
        for number in range(1 if config.quick else count)
    ]
    (work / "points").mkdir(exist_ok=True)
    missing = [job for job in jobs if not point_file(work, job).exists()]
    trainings = run_jobs(missing, world, work, config.workers)
    for _ in tqdm(trainings, "trainings", len(missing), unit="model", disable=None):
        pass

    points = [json.loads(point_file(work, job).read_text(encoding="utf-8")) for job in jobs]
    results = environment() | {
        "seed": config.seed, "sizes": sizes._asdict(),
        "seconds_of_this_run": round(time.perf_counter() - started, 1),
    } | counted(truth, config.seed)  # fmt: skip
    results["points"] = [point for point in points if "curve" not in point]
    results["overoptimisation"] = [point for point in points if "curve" in point]
    results["expectations"], report = report_of(results)
    (work / "frontier.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (work / "report.txt").write_text(report + "\n", encoding="utf-8")
    for name, draw_picture in (("frontier", draw_frontier), ("overoptimisation", draw_overoptimisation)):
        for kind in ("png", "svg"):
            draw_picture(results, work / f"{name}.{kind}")
    print(report)
    folder = commit_output(config)
    print(f"saved to {folder}: frontier.json, report.txt, frontier.png, overoptimisation.png")
    return folder


def truth_of(world: World, path: Path) -> Truth:
    """The reference's leaves are computed once, and kept in `path`."""
    codec = Codec(load_tokenizer(world.reference, key="reference"))
    prompts = [encode_prompt(codec, prompt) for prompt in world.held_out]
    if not path.exists():
        logprobs = leaf_logprobs(load_causal_lm(world.reference, key="reference"), prompts)
        write_whole(path, save({"ref_logprobs": logprobs}))
    return Truth(prompts, load_file(path)["ref_logprobs"], torch.stack([leaf_rewards(p) for p in world.held_out]))


def counted(truth: Truth, seed: int) -> dict[str, Any]:
    """The numbers without any training: the reference, the frontier, best of n, and importance weights."""
    _, ref, rewards = truth
    probabilities = ref.exp()
    generator = torch.Generator().manual_seed(seed)
    drawn = [row[draw(logprobs, DRAWS, generator)] for logprobs, row in zip(ref, rewards, strict=True)]
    importance = []
    for beta in IMPORTANCE_BETAS:
        sizes = [effective_sample_size(row, beta) for row in drawn]
        importance.append(
            {"beta": beta, "draws": DRAWS, "least": min(sizes), "median": median_low(sizes), "most": max(sizes)}
        )
    mean = (probabilities * rewards).sum(-1)
    return {
        "reference": {
            "reward": mean.mean().item(),
            "reward_std": ((probabilities * rewards.square()).sum(-1) - mean.square()).sqrt().mean().item(),
            "entropy": -(probabilities * ref).sum(-1).mean().item(),
            "leaves": ref.shape[1],
            "largest_reward": rewards.amax(-1).mean().item(),
            "silence": probabilities[:, 0].mean().item(),
        },
        "frontier": [{"beta": b} | value_of(optimum(ref, rewards, b), ref, rewards)._asdict() for b in FRONTIER_BETAS],
        "best_of_n": [
            {"n": n, **value_of(best_of(ref, rewards, n), ref, rewards)._asdict(), "kl_bound": bound_on_best_of(n)}
            for n in BEST_OF
        ],
        "importance_weighting": importance,
    }


# --- jobs


def point_file(work: Path, job: Job) -> Path:
    return work / "points" / f"{job.name}.json"


def run_jobs(jobs: list[Job], world: World, work: Path, workers: int | None) -> Iterator[None]:
    """Runs the jobs, each in one of `workers` processes with one thread, or in this one; yields once for each."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        yield from map(run_job, jobs, repeat(world), repeat(work))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads that it has not
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=begin_worker) as pool:
        yield from pool.map(run_job, jobs, repeat(world), repeat(work))  # an error cancels what has not begun


def begin_worker() -> None:
    """One thread, and no life beyond the parent's: where that is killed, a run that goes on would meet this one."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def run_job(job: Job, world: World, work: Path) -> None:
    """Trains and measures; leaves points/JOB.json, whole once it is there, and the training's files in runs/JOB."""
    folder = work / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed here
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    started, started_cpu = time.perf_counter(), time.process_time()
    try:
        with quiet(log):
            model = job.method.train(world, job.strength, job.seed, folder)
            trained, trained_cpu = time.perf_counter(), time.process_time()
            measured = measure(job, model, truth_of(world, work / LEAVES_FILE))
    except (UsageError, TrainingError) as error:
        raise type(error)(
            f"{job.name}: {error}\nits output is in {log}; --resume_from_checkpoint goes on from there"
        ) from error
    point = {"method": job.method.name, job.method.strength: job.strength, "seed": job.seed} | measured
    point |= {
        "commit": commit(), "train_seconds": round(trained - started, 2),
        "train_cpu_seconds": round(trained_cpu - started_cpu, 2),
        "measure_seconds": round(time.perf_counter() - trained, 2),
    }  # fmt: skip
    write_whole(point_file(work, job), json.dumps(point))


def measure(job: Job, model: Path, truth: Truth) -> dict[str, Any]:
    prompts, ref, rewards = truth
    if job.method.name == REWARD_MODEL.name:
        proxy = proxy_rewards(load_reward_model(str(model), key="model"), prompts, ref)
        points = curve(ref, proxy, rewards)
        return {"agreement": agreement(ref, proxy, rewards), "peak": peak(points), "curve": points}
    logprobs = leaf_logprobs(load_causal_lm(str(model), key="model"), prompts)
    value = value_of(logprobs, ref, rewards)
    start = value_of(ref, ref, rewards).reward
    best = reward_at(ref, rewards, value.kl)
    # Of the gain over the reference that is possible at the same KL; NaN where none is possible.
    share = (value.reward - start) / (best - start) if best > start else math.nan
    silence = logprobs[:, 0].exp().mean().item()  # the empty completion's
    return {"reward": value.reward, "kl": value.kl, "best_reward": best, "share": share, "silence": silence}


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Inside, what is printed goes to `log`: dozens of trainings would bury what matters."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
