"""A model that cannot multiply learns to ask a calculator: GRPO of SmolLM2-135M-Instruct with an environment.

python -m tests.real.calculator MODEL FOLDER [STEPS]: trains an adapter, and prints what became of the reward.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CALL = re.compile(r"<calc>\s*(\d{1,6})\s*([-+*])\s*(\d{1,6})\s*</calc>")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
SHOWN = (  # what the tool is, and how it is used
    {
        "role": "system",
        "content": "Answer questions. <calc>EXPRESSION</calc> asks a calculator for the result.",
    },
    {"role": "user", "content": "What is 12 times 11?"},
    {"role": "assistant", "content": "<calc>12*11</calc>"},
    {"role": "user", "content": "132"},
    {"role": "assistant", "content": "132"},
)
FLAGS = (
    "--environment tests.real.calculator:Calculator --num_generations 8 --batch_size 32 --micro_batch_size 16 "
    "--max_completion_length 64 --learning_rate 1e-3 --lr_scheduler_type constant --use_peft --lora_r 8 "
    "--lora_target_modules all-linear --lora_dropout 0 --dtype float32 --save_only_model --inspect_rows 0"
)


class Calculator:
    """Answers a call, once; the last turn is right where it has the row's answer."""

    def reset(self, row: dict[str, Any]) -> None:
        self.answer, self.calls = str(row["answer"]), 0

    def step(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float, bool]:
        said = messages[-1]["content"]
        call = CALL.search(said)
        if call is None or self.calls:
            return [], float(self.answer in re.findall(r"\d+", said.replace(",", ""))), True
        self.calls += 1
        result = OPERATIONS[call[2]](int(call[1]), int(call[3]))
        return [{"role": "user", "content": str(result)}], 0.0, False


def write_questions(path: Path, count: int = 64) -> None:
    rng, rows = random.Random(0), []
    for _ in range(count):
        a, b = rng.randrange(13, 99), rng.randrange(13, 99)
        rows.append({"prompt": [*SHOWN, {"role": "user", "content": f"What is {a} times {b}?"}], "answer": str(a * b)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(model: Path, folder: Path, steps: int, *flags: str) -> list[dict[str, float]]:
    """Trains; returns the lines of metrics.jsonl."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_questions(folder.parent / "questions.jsonl")
    words = f"grpo --model_name_or_path {model} --dataset_name {folder.parent / 'questions.jsonl'} "
    words += f"--output_dir {folder} --max_steps {steps} {FLAGS}"
    subprocess.run([sys.executable, "-m", "rlhf_trainer", *words.split(), *flags], check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    model, folder, *steps = sys.argv[1:]
    for row in train(Path(model), Path(folder), int(*steps or [20])):
        print(f"iteration {row['step']:2.0f}: reward {row['reward']:.2f}, {row['completions/mean_length']:.0f} tokens")
