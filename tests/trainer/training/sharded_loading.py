"""Run by test_fsdp.py in two processes, `sharded_loading.py MODEL`: prints the most memory of its own that a process
has while it loads a policy that was saved in bf16, and cuts it, over the size of the policy in fp32."""

import sys
import threading

from rlhf_trainer.models.fused_lm import load_policy
from rlhf_trainer.models.loading import load_codec_for
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.training.fsdp import place
from rlhf_trainer.training.metrics import make_accelerator
from rlhf_trainer.training.processes import leave_processes


def own_bytes():
    """Pages that are not those of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


accelerator = make_accelerator([], sys.argv[1])
config = DPOConfig(model_name_or_path=sys.argv[1], dataset_name="d", output_dir="o")
codec = load_codec_for(config)
before, most, done = own_bytes(), 0, threading.Event()


def watch():
    global most
    while not done.wait(0.002):
        most = max(most, own_bytes())


watcher = threading.Thread(target=watch)
watcher.start()
policy = load_policy(config, *codec)
whole = 4 * sum(weight.numel() for weight in policy.parameters())
place(policy, accelerator, bf16=False, dtype=config.trained_dtype)
done.set()
watcher.join()
part = sum(weight.to_local().nbytes for weight in policy.parameters())
print(f"rank {accelerator.process_index} of its own {(most - before) / whole:.3f} kept {part / whole:.3f}", flush=True)
leave_processes()
