"""The methods that `rlhf frontier` compares: each a function (world, strength, seed, folder) -> folder of the model.

Every method starts from the reference model and sees the training prompts only. They are the stages that a user runs,
with the options in stages.yaml, on files such as a user would have; the hidden reward speaks through a Bradley-Terry
annotator of pairs (DPO, reward models), or as a reward function (rejection sampling, PPO, GRPO).
"""

import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import GPT2LMHeadModel

from ...commands import COMMANDS
from ...config.parse import checked_values
from ...data.completions import COMPLETIONS_FILE
from ...data.rows import read_rows
from ...models.loading import save_model
from ...recipes.file import filled
from ...training.journal import write_jsonl
from ..tiny import prefers_first, tiny_gpt2
from .language import MAX_WORDS, PROMPT_WORDS, WORDS, all_prompts, hidden_reward, make_tokenizer, write_completion
from .report import COVERING

STAGES = Path(__file__).with_name("stages.yaml")


class Sizes(NamedTuple):
    """The sizes of data and trainings."""

    held_out: int  # prompts
    demonstrations: int  # completions of the language, for the reference model
    completions: int  # a prompt, that pairs are made of
    pairs: int
    dpo_epochs: int
    sft_epochs: int
    ppo_iterations: int
    grpo_iterations: int
    reward_steps: int  # at least, of a reward model
    reward_pairs: tuple[int, ...]
    betas: tuple[float, ...]
    counts: tuple[int, ...]  # N of rejection sampling, best of N


WHOLE = Sizes(
    held_out=32, demonstrations=30_000, completions=32, pairs=200_000, dpo_epochs=2, sft_epochs=4, ppo_iterations=50,
    grpo_iterations=80, reward_steps=150, reward_pairs=(200, 2_000, 20_000),
    betas=(0.1, 0.2, 0.5, 1.0, 2.0), counts=(2, 4, 16, 64),
)  # fmt: skip
QUICK = Sizes(
    held_out=2, demonstrations=4_000, completions=4, pairs=500, dpo_epochs=1, sft_epochs=1, ppo_iterations=2,
    grpo_iterations=2, reward_steps=10, reward_pairs=(50, 200),
    betas=(0.5, 2.0), counts=(2, 4),
)  # fmt: skip


class World(NamedTuple):
    """The reference model's folder, and the prompts to learn from and to measure on."""

    reference: str
    prompts_file: str  # those that methods may see
    train: list[str]
    held_out: list[str]
    sizes: Sizes


def make_world(folder: Path, sizes: Sizes, seed: int) -> World:
    """Teaches a tiny GPT-2 the language; what is in `folder` already is taken as it is."""
    rng = random.Random(seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    held_out, train = prompts[: sizes.held_out], prompts[sizes.held_out :]
    world = World(str(folder / "reference"), str(folder / "prompts.jsonl"), train, held_out, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    repeated = rng.choices(train, k=sizes.demonstrations)
    texts = [{"prompt": prompt, "completion": f" {write_completion(prompt, rng)}"} for prompt in repeated]
    write_jsonl(folder / "demonstrations.jsonl", texts)
    write_jsonl(Path(world.prompts_file), [{"prompt": prompt} for prompt in train])
    torch.manual_seed(seed)
    save_model(make_model(), make_tokenizer(), folder / "start")
    run_stage("reference", world, seed, folder)
    return world


def make_model() -> GPT2LMHeadModel:
    positions = PROMPT_WORDS + MAX_WORDS + 1
    return tiny_gpt2(len(WORDS) + 1, positions, width=64, layers=2, activation_function="gelu_pytorch_tanh")


def run_stage(name: str, world: World, seed: int, folder: Path, **values: Any) -> Path:
    """Runs a stage of stages.yaml, whose ${names} are the sizes, the world's files, seed, folder and `values`; returns
    the stage's own folder."""
    known = {"reference": world.reference, "prompts": world.prompts_file, "seed": seed, "folder": str(folder)}
    values |= known | world.sizes._asdict()
    options = filled(yaml.safe_load(STAGES.read_text(encoding="utf-8"))[name], values.__getitem__)
    command = COMMANDS[options.pop("command")]
    cls = command.load_config()
    return command.load_function()(cls(**checked_values(cls, options, f"{STAGES.name}, {name}", "rlhf")))


def completions_of(
    world: World, count: int, seed: int, folder: Path, steps: int = MAX_WORDS, writers: Sequence[str] = ()
) -> list[list[dict[str, Any]]]:
    """`count` completions for each training prompt, by prompt; of the reference, or shared out to `writers`."""
    writers = writers or (world.reference,)
    sampled = run_stage("sample", world, seed, folder, writers=list(writers), count=count // len(writers), steps=steps)
    groups: dict[int, list[dict[str, Any]]] = {}
    for _, row in read_rows(str(sampled / COMPLETIONS_FILE), split="train"):
        groups.setdefault(row["prompt_row"], []).append(row)
    return list(groups.values())


def write_pairs(world: World, count: int, seed: int, folder: Path, writers: Sequence[str] = ()) -> Path:
    """`count` pairs of completions, of the reference or `writers`, spread over the training prompts, compared once.

    Empty completions are left out, and pairs of equals.
    """
    rng = random.Random(seed)
    per_prompt = -(-count // len(world.train))
    rows, left = [], count
    each = min(world.sizes.completions, 2 * per_prompt)
    for group in completions_of(world, each, seed, folder, writers=writers):
        prompt = group[0]["prompt"]
        texts = sorted({row["completion"] for row in group if row["completion"]})
        rewards = [hidden_reward(prompt, text) for text in texts]
        couples = list(itertools.combinations(range(len(texts)), 2))
        pairs = [
            (a, b) if prefers_first(rewards[a], rewards[b], rng) else (b, a)
            for a, b in rng.sample(couples, min(per_prompt, left, len(couples)))
        ]
        left -= len(pairs)
        if pairs:
            rows.append({"prompt": prompt, "responses": texts, "pairs": pairs})
    path = folder / "pairs.jsonl"
    write_jsonl(path, rows)
    return path


def dpo(world: World, beta: float, seed: int, folder: Path, writers: Sequence[str] = ()) -> Path:
    """DPO on as many pairs of each prompt's completions, each compared once."""
    write_pairs(world, world.sizes.pairs, seed, folder, writers)
    return run_stage("dpo", world, seed, folder, beta=beta)


def dpo_covering(world: World, beta: float, seed: int, folder: Path) -> Path:
    """DPO, but half of the completions are of a policy that PPO has brought near the optimum for this beta: completions
    of the best policy, which the reference hardly ever writes, are then among the pairs."""
    near_optimum = online(world, beta, seed, folder / "ppo", stage="ppo")
    return dpo(world, beta, seed, folder, (world.reference, str(near_optimum)))


def rejection(world: World, count: float, seed: int, folder: Path) -> Path:
    """The best of `count` completions of each prompt, learned by SFT."""
    # A step more than completions need: `rlhf rejection` leaves out a completion without an end.
    completions_of(world, int(count), seed, folder, MAX_WORDS + 1)
    run_stage("rejection", world, seed, folder)
    return run_stage("sft", world, seed, folder)


def online(world: World, beta: float, seed: int, folder: Path, *, stage: str) -> Path:
    """PPO or GRPO with the KL in the reward, as drawn: its expected gradient is that of the KL, and what groups compare
    is the objective. (The exact KL at a token is the same whichever token is drawn: as a reward it would hold back only
    the tokens before.)"""
    return run_stage(stage, world, seed, folder, beta=beta)


def reward_model(world: World, pairs: float, seed: int, folder: Path) -> Path:
    """A reward model from so many pairs: four passes, or more where those would be fewer than reward_steps of 64."""
    write_pairs(world, int(pairs), seed, folder)
    steps = -(-int(pairs) // 64)
    return run_stage("reward", world, seed, folder, epochs=max(4, -(-world.sizes.reward_steps // steps)))


class Method(NamedTuple):
    """A method under its `name` in pictures; `strength` is the option that varies, `train` its training."""

    name: str
    strength: str
    train: Callable[[World, float, int, Path], Path]
    most: int | None = None  # strengths to take, from the first; None: all

    def strengths(self, sizes: Sizes) -> tuple[float, ...]:
        return {"beta": sizes.betas, "N": sizes.counts, "pairs": sizes.reward_pairs}[self.strength][: self.most]


METHODS = (
    Method("rejection sampling + SFT", "N", rejection),
    Method("DPO", "beta", dpo),
    Method("PPO", "beta", partial(online, stage="ppo")),
    Method("GRPO", "beta", partial(online, stage="grpo")),
    Method(COVERING, "beta", dpo_covering, most=2),
)
REWARD_MODEL = Method("reward model", "pairs", reward_model)
