"""`make demo-real`: DPO teaches SmolLM2-135M-Instruct to be brief, with 64 pairs, on a CPU.

python tests/real/demo.py MODEL FOLDER: the model to train, and where everything that is made goes. Every stage is the
`rlhf` command that a user runs; this file only reads what they write. demo_pairs.jsonl has the pairs, each of a short
and of a long-winded answer; demo_held_out.jsonl has eight more, which are never trained on.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
PAIRS, HELD_OUT = HERE / "demo_pairs.jsonl", HERE / "demo_held_out.jsonl"
MAX_NEW_TOKENS = 100
SHOWN = 3
# apo_zero raises the short answers themselves, by 12 nats here; sigmoid, once the long-winded ones have fallen, by 5.
DPO = (
    "--loss_type apo_zero --learning_rate 5e-6 --warmup_steps 2 --num_train_epochs 2 "
    "--batch_size 8 --micro_batch_size 8 --share_prefix"
)
SAMPLE = f"--temperature 0 --num_completions 1 --max_new_tokens {MAX_NEW_TOKENS} --per_device_generation_batch_size 8"
INTRODUCTION = """\
SmolLM2-135M-Instruct answers at length. 64 pairs, each of a short answer that is preferred and a long-winded one,
teach it by DPO to be brief. What it has learned shows on eight other questions, answered before and after.
(Brief, not right: that takes a larger model.)
"""


def rlhf(command: str, *arguments: str | Path) -> float:
    """Runs `rlhf command`, shows it, and returns the seconds that it took."""
    words = [command]
    for argument in arguments:
        words += argument.split() if isinstance(argument, str) else [str(argument)]
    print("$ rlhf", " ".join(words), flush=True)
    start = time.perf_counter()
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, "-m", "rlhf_trainer", *words], check=True, env=quiet)
    print(flush=True)
    return time.perf_counter() - start


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample(model: Path, folder: Path) -> list[dict[str, Any]]:
    """The greedy answers of a model to the held-out prompts."""
    rlhf("sample", "--models", model, "--dataset_name", HELD_OUT, SAMPLE, "--output_dir", folder)
    return rows_of(folder / "completions.jsonl")


def text_of(row: dict[str, Any]) -> str:
    return row["completion"][-1]["content"].strip()


def side_by_side(left: str, right: str, width: int = 56) -> str:
    """Two texts in columns; line breaks within them are kept."""
    columns = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]] for text in (left, right)
    ]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return "\n".join(f"  {a:<{width}}  {b}".rstrip() for a, b in zip(*padded, strict=True))


def report(before: list[dict[str, Any]], after: list[dict[str, Any]], metrics: list[dict[str, float]]) -> None:
    first, last = (next(row for row in rows if "eval/loss" in row) for rows in (metrics, metrics[::-1]))

    def line(name: str, values: list[str]) -> None:
        print(f"  {name:<64}{values[0]:>10}{values[1]:>10}")

    print(f"The {len(before)} held-out questions and their pairs:\n")
    line("", ["before", "after"])
    line("words of an answer, on average", [f"{words(rows):.1f}" for rows in (before, after)])
    ended = [f"{sum(row['finished'] for row in rows)} of {len(rows)}" for rows in (before, after)]
    line(f"answers that ended within {MAX_NEW_TOKENS} tokens", ended)
    for name, key in (
        ("log-prob of the short answers, nats", "logps/chosen"),
        ("log-prob of the long-winded answers, nats", "logps/rejected"),
        ("DPO's reward margin of short over long-winded, nats", "rewards/margins"),
    ):
        line(name, [f"{row['eval/' + key]:.1f}" for row in (first, last)])
    line("pairs with a positive margin", ["-", f"{last['eval/rewards/accuracies']:.0%}"])
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        print(f"\n  Q: {old['prompt'][-1]['content']}\n{side_by_side('before', 'after')}")
        print(side_by_side(*(text_of(row) + ("" if row["finished"] else " ...") for row in (old, new))))


def words(rows: list[dict[str, Any]]) -> float:
    return sum(len(text_of(row).split()) for row in rows) / len(rows)


def main(model: Path, folder: Path) -> None:
    start = time.perf_counter()
    print(INTRODUCTION)
    shutil.rmtree(folder, ignore_errors=True)
    before = sample(model, folder / "before")
    data = ("--dataset_name", PAIRS, "--eval_dataset", HELD_OUT, "--ref_cache_dir", folder / "cache")
    seconds = rlhf("dpo", "--model_name_or_path", model, *data, DPO, "--output_dir", folder / "model")
    after = sample(folder / "model", folder / "after")
    metrics = rows_of(folder / "model" / "metrics.jsonl")
    report(before, after, metrics)
    total = time.perf_counter() - start
    print(f"\nrlhf dpo took {seconds:.0f} s for {metrics[-1]['step']} steps, everything {total:.0f} s.")
    print(f"The model, for transformers or `rlhf sample`: {folder / 'model'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
