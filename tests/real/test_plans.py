"""What `--dry_run` says a run will hold at most is what it holds, on real models.

Live bytes: glibc maps every block of 128 KiB and more by itself here, and so gives it back when it is freed. By default
it keeps blocks of up to 32 MiB: with an adapter on SmolLM2 a process was 1.3 times as large."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.real_models import GEMMA3, SMOLLM2, assistant, user

pytestmark = pytest.mark.real

SCRIPT = str(Path(__file__).with_name("peak_of_run.py"))
NUMBERS = " ".join(str(number * 37 % 1009) for number in range(70))
CONVERSATION = {"prompt": [user("Count.")], "completion": [assistant(NUMBERS)]}
PAIR = {"prompt": [user("Count.")], "chosen": [assistant(NUMBERS)], "rejected": [assistant(NUMBERS[::-1])]}
RUNS = {
    "sft, all weights": (SMOLLM2, "sft --batch_size 2 --micro_batch_size 2", CONVERSATION),
    "sft, checkpoints": (SMOLLM2, "sft --batch_size 2 --micro_batch_size 2 --gradient_checkpointing", CONVERSATION),
    "dpo, LoRA": (
        SMOLLM2, "dpo --batch_size 1 --use_peft --lora_target_modules all-linear --optim adamw_torch --warmup_steps 0",
        PAIR,
    ),
    "sft, bf16, a large vocabulary": (GEMMA3, "sft --batch_size 1 --bf16", CONVERSATION),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_holds_what_its_plan_says(name, tmp_path):
    model, words, row = RUNS[name]
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    flags = f"--model_name_or_path {model.path} --dataset_name {tmp_path}/rows.jsonl --output_dir {tmp_path}/out "
    flags += "--max_steps 3 --inspect_rows 0 --save_only_model --save_steps 9"
    flags += f" --ref_cache_dir {tmp_path}/cache" if words.startswith("dpo") else ""
    done = subprocess.run(
        [sys.executable, SCRIPT, *words.split(), *model.flags, *flags.split()], capture_output=True, text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    planned, measured = map(int, re.search(r"planned (\d+) measured (\d+)", done.stdout).groups())
    assert planned == pytest.approx(measured, rel=0.25), (planned, measured)
