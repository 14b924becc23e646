"""Run by test_plans.py, `peak_of_run.py COMMAND FLAGS...`: prints the bytes that a run held at most in its second and
later updates, beside what Python and its packages took before, and what the plan of that run says."""

import re
import sys
from pathlib import Path

import torch

from rlhf_trainer import planning
from rlhf_trainer.cli import main
from rlhf_trainer.commands import COMMANDS, load
from rlhf_trainer.config.parse import parse_config
from rlhf_trainer.training import loop


def kib_of(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


command, *flags = sys.argv[1:]
config = parse_config(COMMANDS[command].load_config(), flags, "", "")
planned = planning.plan_of(config, planning.read(config, load(COMMANDS[command].reader))[0].examples)[2]
torch.ones(64, 64).matmul(torch.ones(64, 64))  # what libraries take at their first call
before = kib_of("VmRSS")
update = loop.Run.update


def watched(run, task, batch, step):
    if step == 2:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return update(run, task, batch, step)


loop.Run.update = watched
status = main([command, *flags])
print("planned", planned.total(config.gradient_checkpointing), "measured", (kib_of("VmHWM") - before) * 1024)
sys.exit(status)
