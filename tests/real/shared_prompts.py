"""`python -m tests.real.shared_prompts`: completions drawn in this process, by `generate_batch` as it is, and as if it
did not know the model's cache, which is transformers' `generate` of the whole batch; greedy, in turns.

"group of 8", "group of 32": 8 completions of one prompt of 237 tokens, of so many tokens each: what is spared is the
prompt. "questions": one completion of each of 8 short prompts, up to 64 tokens: what is spared is rows that have ended.
Prints a row for each: the medians of the seconds, and of the ratios of neighbours; `--output` names a file for them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch

from rlhf_trainer.rollouts import generation
from rlhf_trainer.rollouts.generation import Sampling, generate_batch
from rlhf_trainer.studies.machine import environment
from tests.real.real_models import GEMMA3, SMOLLM2, load, user

ASKED = (
    "What is the capital of France?", "Is the sea salty?", "2+2=", "Name a fruit.", "Write a story about a fox.",
    "What color is the sky?", "Explain photosynthesis.", "Count to three.",
)  # fmt: skip
TEXT = "The fox walked along the river until it came to a mill, where an old man was counting sacks of grain. " * 12


def batches(model, tokenizer) -> dict[str, tuple[list[list[int]], Sampling]]:
    questions = [tokenizer(model.rendered([user(it)]) + "<|im_start|>assistant\n").input_ids for it in ASKED]
    group = [tokenizer(TEXT).input_ids[:237]] * 8
    return {
        **{f"group of {count}": (group, Sampling(count, temperature=0.0)) for count in (8, 32)},
        "questions": (questions, Sampling(64, temperature=0.0)),
    }


def compare(model, turns: int) -> list[dict]:
    policy, tokenizer = load(model.path)
    rows = []
    for name, (prompts, sampling) in batches(model, tokenizer).items():
        if name == "questions" and not model.knows_end:
            continue
        seconds, drawn = {"before": [], "after": []}, {}
        for turn in range(turns):
            for way in sorted(seconds, reverse=turn % 2 == 0):
                known = generation.cache_of_rows if way == "after" else lambda model: None
                with mock.patch.object(generation, "cache_of_rows", known):
                    started = time.perf_counter()
                    drawn[way] = generate_batch(policy, tokenizer, prompts, sampling, seed=0, number=0)
                    seconds[way].append(time.perf_counter() - started)
        before, after = (statistics.median(seconds[way]) for way in ("before", "after"))
        ratio = statistics.median(b / a for b, a in zip(seconds["before"], seconds["after"], strict=True))
        rows.append({
            "model": model.name, "batch": name, "prompt_tokens": list(map(len, prompts)),
            "new_tokens": [len(done.ids) for done in drawn["after"]],
            "same_tokens": [done.ids for done in drawn["before"]] == [done.ids for done in drawn["after"]],
            "before_s": round(before, 2), "after_s": round(after, 2), "ratio": round(ratio, 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [row for model in (SMOLLM2, GEMMA3) for row in compare(model, arguments.turns)]
    if arguments.output:
        content = environment() | {"threads": torch.get_num_threads(), "turns": arguments.turns, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
