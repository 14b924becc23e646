"""The methods that `rlhf frontier` compares: each a function (world, strength, seed, folder) -> folder of the model.

Every method starts from the reference model and sees the training prompts only. They are the stages that a user runs,
on files such as a user would have; the hidden reward speaks through a Bradley-Terry annotator of pairs (DPO, reward
models), or as a reward function (rejection sampling, PPO, GRPO). Learning rates and sizes were chosen on training
prompts, with another seed than those of the comparison.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ...data.completions import COMPLETIONS_FILE
from ...models.loading import save_model
from ...offline.config import DPOConfig, RewardConfig, SFTConfig
from ...offline.dpo import train_dpo
from ...offline.reward_model import train_reward
from ...offline.sft import train_sft
from ...online.config import GRPOConfig, PPOConfig
from ...online.grpo import train_grpo
from ...online.ppo import train_ppo
from ...rewards.config import RejectionConfig
from ...rewards.rejection import rejection as keep_best
from ...rollouts.config import SampleConfig
from ...rollouts.sample import sample
from ...training.journal import write_jsonl
from .language import (
    MAX_WORDS,
    PROMPT_WORDS,
    WORDS,
    all_prompts,
    hidden_reward,
    make_tokenizer,
    prefers_first,
    write_completion,
)
from .report import COVERING

GOLD = "rlhf_trainer.studies.frontier.language:gold"
# The end behind a completion of MAX_WORDS words is cut: it is not the model's to say or leave.
MAX_LENGTH = PROMPT_WORDS + MAX_WORDS
AND_END = {"max_length": MAX_LENGTH + 1}
WIDTH, LAYERS, HEADS = 64, 2, 4


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
    start, texts, questions = folder / "start", folder / "demonstrations.jsonl", folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    repeated = rng.choices(train, k=sizes.demonstrations)
    write_jsonl(texts, [{"prompt": prompt, "completion": f" {write_completion(prompt, rng)}"} for prompt in repeated])
    write_jsonl(questions, [{"prompt": prompt} for prompt in train])
    torch.manual_seed(seed)
    save_model(make_model(), make_tokenizer(), start)
    reference = train_sft(
        SFTConfig(
            **common(folder / "reference", start, seed) | AND_END, dataset_name=str(texts),
            num_train_epochs=sizes.sft_epochs, learning_rate=3e-3, warmup_ratio=0.042, resume_from_checkpoint=True,
        )
    )  # fmt: skip
    return World(str(reference), str(questions), train, held_out, sizes)


def make_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(WORDS) + 1, n_positions=MAX_LENGTH + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def common(output: Path, model: str | Path, seed: int) -> dict[str, Any]:
    """The options of all stages that train."""
    return {
        "output_dir": str(output), "model_name_or_path": str(model), "seed": seed, "max_length": MAX_LENGTH,
        "batch_size": 256, "micro_batch_size": 256, "save_only_model": True, "save_steps": 100_000,
        "project": output.name,
    }  # fmt: skip


def completions_of(
    world: World, count: int, seed: int, folder: Path, steps: int = MAX_WORDS, writers: Sequence[str] = ()
) -> list[list[dict[str, Any]]]:
    """`count` completions for each training prompt, by prompt; of the reference, or shared out to `writers`."""
    writers = writers or (world.reference,)
    sample(
        SampleConfig(
            models=list(writers), dataset_name=world.prompts_file, output_dir=str(folder), seed=seed,
            per_device_generation_batch_size=1024, num_completions=count // len(writers),
            max_prompt_length=PROMPT_WORDS, max_new_tokens=steps,
        )
    )  # fmt: skip
    lines = (folder / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
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
    for group in completions_of(world, each, seed, folder / "completions", writers=writers):
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
    """DPO on as many pairs of each prompt's completions, each compared once; about five prompts a step."""
    pairs = write_pairs(world, world.sizes.pairs, seed, folder, writers)
    options = common(folder / "model", world.reference, seed) | {"batch_size": 1024, "micro_batch_size": 1024}
    return train_dpo(
        DPOConfig(
            **options, dataset_name=str(pairs), max_prompt_length=PROMPT_WORDS,
            ref_cache_dir=str(folder / "reference_logps"), beta=beta, num_train_epochs=world.sizes.dpo_epochs,
            optim="adamw_torch_fused", learning_rate=1e-3, lr_scheduler_type="cosine", warmup_ratio=0.05,
        )
    )  # fmt: skip


def dpo_covering(world: World, beta: float, seed: int, folder: Path) -> Path:
    """DPO, but half of the completions are of a policy that PPO has brought near the optimum for this beta: completions
    of the best policy, which the reference hardly ever writes, are then among the pairs."""
    near_optimum = ppo(world, beta, seed, folder / "ppo")
    return dpo(world, beta, seed, folder, (world.reference, str(near_optimum)))


def rejection(world: World, count: float, seed: int, folder: Path) -> Path:
    """The best of `count` completions of each prompt, learned by SFT."""
    # A step more than completions need: `rlhf rejection` leaves out a completion without an end.
    completions_of(world, int(count), seed, folder / "completions", MAX_WORDS + 1)
    selected = keep_best(
        RejectionConfig(
            completions=[str(folder / "completions")], reward_funcs=[GOLD], k=1, output_dir=str(folder / "selected"),
            max_length=MAX_LENGTH + 1, per_device_eval_batch_size=1024, seed=seed,
        )
    )  # fmt: skip
    options = common(folder / "model", world.reference, seed) | AND_END | {"batch_size": 64, "micro_batch_size": 64}
    return train_sft(
        SFTConfig(
            **options, dataset_name=str(selected / "selected.jsonl"), num_train_epochs=world.sizes.sft_epochs,
            learning_rate=1e-3,
        )
    )  # fmt: skip


def online(world: World, beta: float, seed: int, output: Path) -> dict[str, Any]:
    """The options of PPO and GRPO."""
    options = common(output, world.reference, seed) | {"batch_size": 512, "micro_batch_size": 512}
    del options["max_length"]
    return options | {
        "dataset_name": world.prompts_file, "reward_funcs": [GOLD], "beta": beta, "max_prompt_length": PROMPT_WORDS,
        "max_completion_length": MAX_WORDS, "per_device_generation_batch_size": 512, "lr_scheduler_type": "linear",
    }  # fmt: skip


def ppo(world: World, beta: float, seed: int, folder: Path) -> Path:
    """KL in the reward, as drawn: its expected gradient is that of the KL. (The exact KL at a token is the same
    whichever token is drawn: as a reward it would hold back only the tokens before.)"""
    options = online(world, beta, seed, folder / "model")
    return train_ppo(
        PPOConfig(
            **options, max_steps=world.sizes.ppo_iterations, kl_estimator="k1", kl_in="reward", learning_rate=1e-3,
            num_ppo_epochs=2, num_mini_batches=2,
        )
    )  # fmt: skip


def grpo(world: World, beta: float, seed: int, folder: Path) -> Path:
    """KL in the reward, as drawn: what groups compare is then the objective."""
    options = online(world, beta, seed, folder / "model")
    return train_grpo(
        GRPOConfig(
            **options, max_steps=world.sizes.grpo_iterations, loss_type="dr_grpo", kl_estimator="k1", kl_in="reward",
            num_generations=8, learning_rate=2e-3,
        )
    )  # fmt: skip


def reward_model(world: World, pairs: float, seed: int, folder: Path) -> Path:
    """A reward model from so many pairs: four passes, or more where those would be fewer than reward_steps."""
    path = write_pairs(world, int(pairs), seed, folder)
    options = common(folder / "model", world.reference, seed) | {"batch_size": 64, "micro_batch_size": 64}
    steps = -(-int(pairs) // 64)
    return train_reward(
        RewardConfig(
            **options, dataset_name=str(path), max_prompt_length=PROMPT_WORDS, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=5, num_train_epochs=max(4, -(-world.sizes.reward_steps // steps)),
        )
    )  # fmt: skip


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
    Method("PPO", "beta", ppo),
    Method("GRPO", "beta", grpo),
    Method(COVERING, "beta", dpo_covering, most=2),
)
REWARD_MODEL = Method("reward model", "pairs", reward_model)
