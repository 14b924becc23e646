"""Tasks with a known answer, half learned by imitation, are solved by reinforcement, on unseen prompts, too."""

import json
import random

import pytest
import torch

from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.ppo import train_ppo
from tests.trainer.online import known_tasks as tasks


def half_taught(folder, rows, held_out, width, steps, learning_rate, wrong):
    """Options for a model that was taught with a share of wrong answers, and cannot but write as many itself."""
    random.Random(0).shuffle(rows)
    torch.manual_seed(0)
    tokenizer = tasks.character_tokenizer()
    model = tasks.small_gpt2(tokenizer, width=width)
    tasks.half_taught(model, tokenizer, rows[:-held_out], steps, seed=0, learning_rate=learning_rate, wrong=wrong)
    return {
        "model_name_or_path": tasks.save(folder / "model", model, tokenizer),
        "dataset_name": tasks.write_rows(folder / "rows.jsonl", rows[:-held_out]),
        "eval_dataset": tasks.write_rows(folder / "held_out.jsonl", rows[-held_out:]),
    }


@pytest.fixture(scope="module")
def reversal(tmp_path_factory):
    return half_taught(tmp_path_factory.mktemp("reversal"), tasks.reversals(4), 100, 64, 150, 3e-3, wrong=0.5)


@pytest.fixture(scope="module")
def addition(tmp_path_factory):
    return half_taught(tmp_path_factory.mktemp("addition"), tasks.additions(), 500, 96, 500, 2e-3, wrong=0.3)


def accuracies(train, config):
    """On held-out prompts, before and after."""
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines[0]["eval/reward"], lines[-1]["eval/reward"]


COMMON = {
    "reward_funcs": ["exact_answer"], "max_prompt_length": 8, "max_completion_length": 6, "batch_size": 256,
    "micro_batch_size": 256, "per_device_generation_batch_size": 512,
}  # fmt: skip
FALLING = {"learning_rate": 5e-4, "lr_scheduler_type": "linear"}
PPO = {"value_model": "shared", "num_mini_batches": 2, "num_ppo_epochs": 2, "beta": 0.02}


@pytest.mark.xdist_group("reversal")
def test_ppo_reverses_words(reversal, tmp_path):
    config = PPOConfig(**COMMON, **PPO, **reversal, output_dir=str(tmp_path / "out"), max_steps=20, learning_rate=1e-3)
    before, after = accuracies(train_ppo, config)
    assert before < 0.8 and after > 0.93


@pytest.mark.xdist_group("reversal")
def test_grpo_reverses_words(reversal, tmp_path):
    more = {"num_generations": 8, "max_steps": 20, "learning_rate": 1e-3}
    before, after = accuracies(train_grpo, GRPOConfig(**COMMON, **reversal, output_dir=str(tmp_path / "out"), **more))
    assert before < 0.8 and after > 0.9


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce"])
@pytest.mark.xdist_group("reversal")
def test_every_loss_type_learns(reversal, tmp_path, loss_type):
    more = {"num_generations": 8, "max_steps": 10, "learning_rate": 1e-3}
    config = GRPOConfig(**COMMON, **reversal, output_dir=str(tmp_path / "out"), loss_type=loss_type, **more)
    before, after = accuracies(train_grpo, config)
    assert after > before + 0.1


@pytest.mark.xdist_group("addition")
def test_ppo_adds(addition, tmp_path):
    config = PPOConfig(**COMMON, **PPO, **addition, output_dir=str(tmp_path / "out"), max_steps=30, **FALLING)
    before, after = accuracies(train_ppo, config)
    assert before < 0.8 and after > 0.9


@pytest.mark.xdist_group("addition")
def test_grpo_adds(addition, tmp_path):
    more = {"num_generations": 8, "max_steps": 40} | FALLING
    before, after = accuracies(train_grpo, GRPOConfig(**COMMON, **addition, output_dir=str(tmp_path / "out"), **more))
    assert before < 0.8 and after > 0.9
