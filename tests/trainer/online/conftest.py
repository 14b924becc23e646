"""A tiny task, and runs of PPO and GRPO on it."""

import json

import pytest
import torch

from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import GRPO, train_grpo
from rlhf_trainer.online.ppo import PPO, train_ppo
from tests.trainer.online import known_tasks as tasks

UNUSED = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["exact_answer"], "output_dir": "out"}
ALGORITHMS = {"ppo": (PPOConfig, PPO, train_ppo), "grpo": (GRPOConfig, GRPO, train_grpo)}


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Options of a tiny run: a model of characters that has half learned to reverse words of two letters."""
    folder = tmp_path_factory.mktemp("reversal")
    torch.manual_seed(0)
    tokenizer, rows = tasks.character_tokenizer(), tasks.reversals(2)
    model = tasks.half_taught(tasks.small_gpt2(tokenizer, width=32, layers=1), tokenizer, rows, 200, seed=0)
    return {
        "model_name_or_path": tasks.save(folder / "model", model, tokenizer),
        "dataset_name": tasks.write_rows(folder / "rows.jsonl", rows), "reward_funcs": ["exact_answer"],
        "batch_size": 16, "micro_batch_size": 4, "per_device_generation_batch_size": 8, "max_prompt_length": 8,
        "max_completion_length": 5, "max_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip


@pytest.fixture
def run(task, tmp_path):
    """run("ppo" or "grpo", **options) -> (folder, lines of metrics.jsonl)."""
    made = iter(range(100))

    def train(algorithm, **options):
        config, _, function = ALGORITHMS[algorithm]
        more = {"num_generations": 4} if algorithm == "grpo" else {"value_model": "shared"}
        options = task | more | {"output_dir": str(tmp_path / f"out{next(made)}")} | options
        folder = function(config(**options))
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train
