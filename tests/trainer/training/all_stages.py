"""SFT, a reward model and DPO, in as many processes as run this: `all_stages.py MODEL DATA DPO.yaml FOLDER`.

SFT is interrupted in its fourth step and resumed, into FOLDER/resumed, too. A tracker hears of the reward model alone.
DPO is the command itself, which leaves the processes when it is done.
"""

import sys
from pathlib import Path

from accelerate import tracking

from rlhf_trainer.cli import main
from rlhf_trainer.offline.config import RewardConfig, SFTConfig
from rlhf_trainer.offline.reward_model import train_reward
from rlhf_trainer.offline.sft import train_sft
from rlhf_trainer.training import loop

model, data, dpo_config, folder = *sys.argv[1:4], Path(sys.argv[4])
COMMON = {
    "model_name_or_path": model, "dataset_name": data, "eval_dataset": data, "batch_size": 6, "micro_batch_size": 2,
    "learning_rate": 1e-3, "num_train_epochs": 3, "max_length": 96, "save_steps": 2,
}  # fmt: skip
SFT = COMMON | {"packing": True}


class Prints(tracking.GeneralTracker):
    """Prints the number of steps it was sent."""

    name = "prints"
    requires_logging_directory = False
    steps = 0

    def __init__(self, run_name, **_):
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        assert values["max_prompt_length"] == 48

    def log(self, values, step=None, **_):
        self.steps += 1

    def finish(self):
        print(f"tracked {self.steps} records")


def interrupted(run):
    """Stops in its fourth step, behind the checkpoint of the second."""
    learning_rate_at, calls = loop.learning_rate_at, []

    def once_too_often(*args):
        calls.append(1)
        if len(calls) == 4:
            raise InterruptedError
        return learning_rate_at(*args)

    loop.learning_rate_at = once_too_often
    try:
        run()
    except InterruptedError:
        return
    finally:
        loop.learning_rate_at = learning_rate_at
    raise AssertionError("it was to be interrupted")


train_sft(SFTConfig(**SFT, output_dir=str(folder / "sft")))
interrupted(lambda: train_sft(SFTConfig(**SFT, output_dir=str(folder / "resumed"))))
train_sft(SFTConfig(**SFT, output_dir=str(folder / "resumed"), resume_from_checkpoint=True))
tracking.LOGGER_TYPE_TO_CLASS["prints"] = Prints
train_reward(RewardConfig(**COMMON, max_prompt_length=48, output_dir=str(folder / "reward"), report_to=["prints"]))
dpo = ["dpo", "--config", dpo_config, "--skip_invalid_rows", "--output_dir", str(folder / "dpo")]
sys.exit(main([*dpo, "--ref_cache_dir", str(folder / "cache")]))  # each number of processes computes its own reference
