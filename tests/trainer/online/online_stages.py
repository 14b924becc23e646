"""PPO or GRPO, in as many processes as this was started with: `online_stages.py ALGORITHM OPTIONS.json FOLDER`."""

import json
import sys
from pathlib import Path

from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.ppo import train_ppo
from rlhf_trainer.training.processes import leave_processes

algorithm, options, folder = sys.argv[1:]
config, train = {"ppo": (PPOConfig, train_ppo), "grpo": (GRPOConfig, train_grpo)}[algorithm]
train(config(**json.loads(Path(options).read_text()), output_dir=folder))
leave_processes()
