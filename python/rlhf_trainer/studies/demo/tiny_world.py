"""The world of the tiny recipes: a base model and data of two tasks whose answers are known, made on a CPU in seconds.

Reviews are the demo's (language.py): a hidden reward for kind words, and an annotator who errs as Bradley-Terry says.
Sums are of two digits below seven, "3 + 5 =". People here answer them in three ways:

    careful   <think> count 3 + 5 is 8 </think> <answer> 8 </answer>      right
    hasty     <think> easy </think> <answer> 9 </answer>                  off by one or two
    bare      8                                                           right, but without a word of how

Those who write demonstrations are hasty in two cases of three, so a model that talks like them is right in form and
wrong in substance, though it could always be right; what a stage makes of that, `measure` tells.
"""

import json
import random
from collections.abc import Sequence
from itertools import combinations, cycle, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...data.batches import Batch, pad_sequences
from ...data.rows import read_rows
from ...models.loading import load_causal_lm, load_tokenizer, save_model
from ...rewards.verifiable import exact_answer, think_answer
from ...training.journal import write_jsonl
from ..tiny import prefers_first, tiny_gpt2
from .language import all_prompts, hidden_reward, is_grammatical, make_tokenizer, write_review
from .measure import sample_reviews
from .run import POSITIONS, train_lm

ALL_SUMS = [f"{a} + {b} =" for a, b in product(range(7), range(7))]
WORDS_OF_SUMS = ["<think> count + is = easy </think> <answer> </answer>", *map(str, range(-2, 15))]
TALK = {"careful": 3, "hasty": 1, "bare": 1}  # parts of the text that the base model reads
DEMONSTRATIONS = {"careful": 1, "hasty": 2}  # by people who write down how they came to it
LM_BATCH, PEAK_LEARNING_RATE = 64, 1e-2
ANSWERS_PER_PROMPT = 16


def make(
    folder: Path,
    *,
    tasks: Sequence[str] = ("reviews", "sums"),
    steps: int = 300,
    demonstrations: int = 512,
    pairs: int = 1024,
    held_out_share: float = 0.2,
    seed: int = 0,
) -> None:
    """Writes into `folder` a base model (base/) and, for each of tasks (reviews, sums), TASK_demonstrations.jsonl,
    TASK_prompts.jsonl, TASK_preferences.jsonl, and the last two with other prompts as held_out_TASK_....jsonl.

    Of sums, which nobody can infer from others, all are demonstrated; held out are those that no preference and no
    reward is about.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    everything = {"reviews": all_prompts(), "sums": list(ALL_SUMS)}
    of_task = {task: everything[task] for task in tasks}
    for prompts in of_task.values():
        rng.shuffle(prompts)
    tokenizer = make_tokenizer(WORDS_OF_SUMS)
    model = tiny_gpt2(len(tokenizer), POSITIONS, width=64, layers=1)

    def talk() -> Batch:
        """Texts of people, each from the first position on; nothing marks its end."""
        prompts = [rng.choice(of_task[rng.choice(list(of_task))]) for _ in range(LM_BATCH)]
        texts = [f"{prompt} {answer(prompt, rng, TALK)}" for prompt in prompts]
        return pad_sequences([([], ids) for ids in tokenizer(texts).input_ids], pad_id=0)

    train_lm(model, talk, steps, PEAK_LEARNING_RATE)
    save_model(model, tokenizer, folder / "base")

    for task, prompts in of_task.items():
        held_out = round(len(prompts) * held_out_share)
        demonstrated = [
            {"prompt": prompt, "completion": f" {answer(prompt, rng, DEMONSTRATIONS)}"}
            for prompt in islice(cycle(prompts if task == "sums" else prompts[held_out:]), demonstrations)
        ]
        write_jsonl(folder / f"{task}_demonstrations.jsonl", demonstrated)
        for name, part, count in (("", prompts[held_out:], pairs), ("held_out_", prompts[:held_out], pairs // 4)):
            write_jsonl(folder / f"{name}{task}_prompts.jsonl", list(map(as_row, part)))
            comparisons = [compared(prompt, rng) for prompt in islice(cycle(part), count)]
            write_jsonl(folder / f"{name}{task}_preferences.jsonl", comparisons)


def answer(prompt: str, rng: random.Random, ways: dict[str, int]) -> str:
    """An answer as people here write it; ways: how often they are careful, hasty, bare with a sum."""
    if not is_sum(prompt):
        return write_review(prompt, rng)
    (way,) = rng.choices(list(ways), list(ways.values()))
    result = right(prompt)
    if way == "careful":
        return f"<think> count {prompt.removesuffix(' =')} is {result} </think> <answer> {result} </answer>"
    if way == "hasty":
        return f"<think> easy </think> <answer> {result + rng.choice([-2, -1, 1, 2])} </answer>"
    return str(result)


def is_sum(prompt: str) -> bool:
    return prompt.endswith(" =")


def right(prompt: str) -> int:
    a, _, b, _ = prompt.split()
    return int(a) + int(b)


def as_row(prompt: str) -> dict[str, Any]:
    """The row of a prompt; verifiable rewards go by its `ground_truth`."""
    return {"prompt": prompt, "ground_truth": str(right(prompt))} if is_sum(prompt) else {"prompt": prompt}


def reward_of(prompt: str, text: str) -> float:
    """The reward of an answer: for a review the hidden one; for a sum 1 if it is right and in form, else 0."""
    if not is_sum(prompt):
        return float(hidden_reward(text))
    return exact_answer(text, [str(right(prompt))]) * think_answer(text)


def compared(prompt: str, rng: random.Random) -> dict[str, Any]:
    """Two different answers of people, in the order of the annotator, who never errs on sums."""
    a = b = answer(prompt, rng, DEMONSTRATIONS)
    while a == b or (is_sum(prompt) and reward_of(prompt, a) == reward_of(prompt, b)):
        b = answer(prompt, rng, DEMONSTRATIONS)
        a = answer(prompt, rng, DEMONSTRATIONS)
    chosen, rejected = (a, b) if better(prompt, a, b, rng) else (b, a)
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def better(prompt: str, a: str, b: str, rng: random.Random) -> bool:
    first, second = reward_of(prompt, a), reward_of(prompt, b)
    return first > second if is_sum(prompt) else prefers_first(first, second, rng)


def compare(folder: Path, *, completions: str, seed: int = 0) -> None:
    """Writes preferences.jsonl: the completions of `rlhf sample`, all pairs of a prompt's in the annotator's order."""
    rng = random.Random(seed)
    written: dict[str, list[str]] = {}
    for _, row in read_rows(f"{completions}/completions.jsonl", split="train"):
        texts = written.setdefault(row["prompt"], [])
        if row["finished"] and row["completion"] and row["completion"] not in texts:
            texts.append(row["completion"])
    rows = []
    for prompt, texts in written.items():
        both = list(combinations(range(len(texts)), 2))
        pairs = [(i, j) if better(prompt, texts[i], texts[j], rng) else (j, i) for i, j in both]
        rows += [{"prompt": prompt, "responses": texts, "pairs": pairs}] if pairs else []
    write_jsonl(folder / "preferences.jsonl", rows)


def right_in_form(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function, of sums; 0 for all else."""
    return [reward_of(p, text) if is_sum(p) else 0.0 for p, text in zip(prompts, completions, strict=True)]


def kind(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function, of reviews: the hidden reward, where it is a review of this language; 0 for all else."""
    pairs = zip(prompts, completions, strict=True)
    return [reward_of(p, text) if not is_sum(p) and is_grammatical(p, text) else 0.0 for p, text in pairs]


def measure(folder: Path, *, models: dict[str, str], prompts: Sequence[str], seed: int = 0) -> None:
    """Writes report.json: the measures of each model's answers, ANSWERS_PER_PROMPT to each prompt."""
    repeated = [row["prompt"] for file in prompts for _, row in read_rows(file, split="train")] * ANSWERS_PER_PROMPT
    report = {}
    for name, path in models.items():
        tokenizer = load_tokenizer(path, key="models", trust_remote_code=False)
        texts = sample_reviews(load_causal_lm(path, key="models"), tokenizer, repeated, seed, batch_size=256)
        report[name] = measures(list(zip(repeated, texts, strict=True)))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measures(answers: list[tuple[str, str]]) -> dict[str, float]:
    """Means over sums and over reviews; of (prompt, text)."""
    sums = [pair for pair in answers if is_sum(pair[0])]
    reviews = [pair for pair in answers if not is_sum(pair[0])]
    values = {
        "sums right and in form": [reward_of(*pair) for pair in sums],
        "sums in form": [think_answer(text) for _, text in sums],
        "reviews, hidden reward": [reward_of(*pair) for pair in reviews],
        "reviews in the language": [float(is_grammatical(*pair)) for pair in reviews],
    }
    return {name: fmean(each) for name, each in values.items() if each}
