"""Five steps of commands in as many processes as run this: `sharded_stages.py MODEL JUDGE DATA FOLDER BEHIND STAGE...`.

Each run stops behind the step BEHIND, as killed, if there is one; the same call with a later one goes on from there.
"""

import os
import sys
from pathlib import Path

import torch

from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.offline.dpo import train_dpo
from rlhf_trainer.offline.reward_model import train_reward
from rlhf_trainer.offline.sft import train_sft
from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.ppo import train_ppo
from rlhf_trainer.training import loop
from rlhf_trainer.training.processes import leave_processes

model, judge, data, folder, behind, *stages = sys.argv[1:]
folder = Path(folder)
COMMON = {
    "model_name_or_path": model, "dataset_name": data, "micro_batch_size": 2, "learning_rate": 3e-3, "max_steps": 5,
    "adam_epsilon": 1e-3,  # so that an update follows its gradient: of Adam's own 1e-8 it is the sign, of noise too
    "save_steps": 1, "inspect_rows": 0, "resume_from_checkpoint": True,
}  # fmt: skip
OFFLINE = COMMON | {"max_length": 96, "batch_size": 6, "num_train_epochs": 3}
PAIRS = OFFLINE | {"max_prompt_length": 48}
ONLINE = COMMON | {
    "max_prompt_length": 48, "batch_size": 8, "max_completion_length": 8, "reward_funcs": ["__main__:shortness"],
    "num_train_epochs": 10, "beta": 0.05,
}  # fmt: skip
LORA = {
    "use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "down_proj"],
    "dtype": "float32",
}  # fmt: skip
SHARED = {"sp_size": 2 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1}
CACHE = {"ref_cache_dir": str(folder / "cache")}
STAGES = {
    "sft": (train_sft, SFTConfig, OFFLINE),
    "sft-lora": (train_sft, SFTConfig, OFFLINE | LORA),
    "dpo": (train_dpo, DPOConfig, PAIRS | CACHE),
    "dpo-lora": (train_dpo, DPOConfig, PAIRS | CACHE | LORA | {"async_save": True}),
    "reward": (train_reward, RewardConfig, PAIRS | {"async_save": True}),
    "reward-lora": (train_reward, RewardConfig, PAIRS | LORA),
    "grpo": (train_grpo, GRPOConfig, ONLINE | {"num_generations": 4}),
    "grpo-idle": (
        train_grpo,
        GRPOConfig,
        ONLINE | {"num_generations": 2, "batch_size": 16, "beta": 0.0, "reward_funcs": ["__main__:parity"]},
    ),
    "grpo-lora": (train_grpo, GRPOConfig, ONLINE | LORA | {"num_generations": 4, "reward_model_name_or_path": judge}),
    "ppo": (train_ppo, PPOConfig, ONLINE),
    "sft-sp": (train_sft, SFTConfig, OFFLINE | SHARED | {"gradient_checkpointing": True}),
    "dpo-sp": (train_dpo, DPOConfig, PAIRS | CACHE | SHARED | {"eval_dataset": data}),
}


def shortness(completions, **_):
    return [-float(len(completion)) for completion in completions]


def parity(completions, **_):
    """Often the same for both completions of a prompt, which then teach nothing."""
    return [float(len(completion) % 2) for completion in completions]


class Killed(Exception):
    """The run has come to the step behind which it stops."""


def stop_behind(step):
    save = loop.save_checkpoint

    def save_and_stop(work, done, *rest):
        save(work, done, *rest)
        if done == step:
            background = rest[-1]
            if background is not None:
                background.wait()
            raise Killed

    loop.save_checkpoint = save_and_stop


stop_behind(int(behind))
for name in stages:
    command, config, options = STAGES[name]
    torch.manual_seed(0)
    try:
        command(config(**options, output_dir=str(folder / name)))
    except Killed:
        continue
leave_processes()
