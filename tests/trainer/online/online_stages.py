"""PPO and GRPO, one after the other, in as many processes as this was started with:
`online_stages.py OPTIONS.json FOLDER`. OPTIONS.json: {"ppo" or "grpo": {option: value}}, where a comma and anything may
follow the name; FOLDER/NAME are the results.
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
for name, options in json.loads(Path(stages).read_text()).items():
    config, train = ALGORITHMS[name.partition(",")[0]]
    train(config(**options, output_dir=f"{folder}/{name}"))
leave_processes()
