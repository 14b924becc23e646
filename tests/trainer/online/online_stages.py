"""PPO and GRPO, one after the other, in as many processes as this was started with:
`online_stages.py OPTIONS.json FOLDER`. OPTIONS.json: {"ppo" or "grpo": {option: value}}; FOLDER/ppo and FOLDER/grpo are
the results.
"""

import json
import sys
from pathlib import Path

from rlhf_trainer.online.config import GRPOConfig, PPOConfig
from rlhf_trainer.online.grpo import train_grpo
from rlhf_trainer.online.ppo import train_ppo
from rlhf_trainer.training.processes import leave_processes

ALGORITHMS = {"ppo": (PPOConfig, train_ppo), "grpo": (GRPOConfig, train_grpo)}
stages, folder = sys.argv[1:]
for algorithm, options in json.loads(Path(stages).read_text()).items():
    config, train = ALGORITHMS[algorithm]
    train(config(**options, output_dir=f"{folder}/{algorithm}"))
leave_processes()
