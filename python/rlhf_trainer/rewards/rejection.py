"""`rlhf reject`: rejection sampling. Completions get rewards, and the best are kept to be learned by SFT.

Rewards make a matrix, prompts by completions (a ragged one: numbers may differ). `top_per_prompt` takes the best of
each row (k = 1: best of N), so every prompt is represented; `top_overall` the best of the whole matrix, so prompts
with high rewards are represented more often; `random` as many of each row as `top_per_prompt`, to tell what choosing
by reward is worth. With `min_reward`, only completions with at least that reward can be selected: those that are right,
say, where the reward is a verifiable one (DeepSeek-R1 makes its data for SFT in this way).

Left out, and counted, is what must not be learned: a completion that did not end within max_new_tokens (SFT would put
an end behind it and teach to stop in mid-sentence), an empty one, and one that is longer than max_length to a reward
model.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config.base import RejectConfig
from ..config.parse import dump_yaml
from ..data.chat import RowError, check_prompt, check_response, kind
from ..data.examples import Prompt, encode_prompt, encode_response
from ..data.rows import read_checked
from ..errors import UsageError
from ..models.loading import check_fit
from ..rollouts.sample import COMPLETIONS_FILE, is_empty
from ..training.journal import Progress, begin, write_jsonl
from ..training.output_folder import commit_output, open_output
from .rewards import load_rewards

SCORED_FILE = "scored.jsonl"
UNFINISHED, EMPTY, TOO_LONG = "unfinished", "empty", "too long"


class Row(NamedTuple):
    """A completion as it was read; `ids`: prompt and completion as each of the reward models' tokenizers makes them."""

    source: str
    number: int
    prompt: Any
    completion: Any
    model: str
    finished: bool
    columns: dict[str, Any]  # of the prompt's row
    ids: list[list[int]]
    left_out: str | None  # why it cannot be selected

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts, whatever file or model they come from."""
        return json.dumps(self.prompt, sort_keys=True)


class Candidate(NamedTuple):
    """A completion that may be selected: its row in the matrix, and its value."""

    prompt: int
    reward: float


def top_per_prompt(candidates: Sequence[Candidate], k: int) -> list[int]:
    """Positions of the k best of each prompt (all, where it has fewer): prompts as they appear, best first.

    Of equal rewards the earlier candidate is the better one.
    """
    return [i for positions in by_prompt(candidates) for i in best_first(candidates, positions)[:k]]


def top_overall(candidates: Sequence[Candidate], k: int, max_per_prompt: int | None = None) -> list[int]:
    """Positions of the k best of all, best first; of a prompt only its max_per_prompt best count. Ties as above."""
    taken: Counter[int] = Counter()
    selected: list[int] = []
    for i in best_first(candidates, range(len(candidates))):
        prompt = candidates[i].prompt
        if len(selected) < k and (max_per_prompt is None or taken[prompt] < max_per_prompt):
            taken[prompt] += 1
            selected.append(i)
    return selected


def random_per_prompt(candidates: Sequence[Candidate], k: int, seed: int) -> list[int]:
    """Positions of k of each prompt, drawn without regard to rewards; prompts and their candidates as they appear."""
    rng = random.Random(seed)
    return [i for positions in by_prompt(candidates) for i in sorted(rng.sample(positions, min(k, len(positions))))]


def by_prompt(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Positions of each prompt's candidates, prompts in order of appearance."""
    groups: dict[int, list[int]] = {}
    for i, candidate in enumerate(candidates):
        groups.setdefault(candidate.prompt, []).append(i)
    return list(groups.values())


def best_first(candidates: Sequence[Candidate], positions: Sequence[int]) -> list[int]:
    return sorted(positions, key=lambda i: (-candidates[i].reward, i))


def select(config: RejectConfig, candidates: Sequence[Candidate]) -> list[int]:
    """Positions of the candidates that are selected, of those with min_reward."""
    if config.min_reward is not None:
        good = [i for i, candidate in enumerate(candidates) if candidate.reward >= config.min_reward]
        chosen = select(replace(config, min_reward=None), [candidates[i] for i in good])
        return [good[i] for i in chosen]
    if config.selection == "top_overall":
        return top_overall(candidates, config.k, config.max_per_prompt)
    if config.selection == "random":
        return random_per_prompt(candidates, config.k, config.seed)
    return top_per_prompt(candidates, config.k)


def reject(config: RejectConfig) -> Path:
    """Writes scored.jsonl (all), selected.jsonl (for SFT) and report.json into output_dir, which it returns."""
    device, finished = begin(config, "rlhf reject")
    if finished:
        return Path(config.output_dir)
    files = files_in(config.completions, COMPLETIONS_FILE, "completions")
    judges = load_rewards(config, device, batch_size=config.batch_size)
    tokenizers = [model.tokenizer for model in judges.models]
    rows = [row for file in files for row in read_completions(file, tokenizers, config.max_length)]
    usable = [row for row in rows if row.left_out is None]
    if not usable:
        raise UsageError(f"completions: none of {len(rows)} can be selected ({in_numbers(left_out(rows))})")
    prompts = [Prompt(row.number, row.prompt, [], None, row.columns) for row in usable]
    texts = [text_of(row.completion) for row in usable]
    for file, group in itertools.groupby(range(len(usable)), key=lambda i: usable[i].source):
        places = list(group)
        for j, model in enumerate(judges.models):
            lengths = [len(usable[i].ids[j]) for i in places]
            check_fit(model.model, model.tokenizer, [usable[i].number for i in places], lengths, file)
        judges.check([prompts[i] for i in places], file)

    work = open_output(config.output_dir, config.overwrite, dump_yaml(config), config.resume)
    data = [(row.ids, row.prompt_key, text, row.columns) for row, text in zip(usable, texts, strict=True)]
    batches = judges.batch_count(prompts, texts)
    with Progress(work / "progress.jsonl", batches, "rlhf reject", data) as progress:
        scores = judges(prompts, texts, run=progress.run)
    rewards = scores.total.tolist()
    numbers = {name: i for i, name in enumerate(dict.fromkeys(row.prompt_key for row in usable))}
    candidates = [Candidate(numbers[row.prompt_key], reward) for row, reward in zip(usable, rewards, strict=True)]
    selected = select(config, candidates)

    parts = [dict(zip(judges.names, values, strict=True)) for values in scores.parts.tolist()]
    known = iter(zip(rewards, parts, strict=True))
    scored = [as_scored(row, *(next(known) if row.left_out is None else (None, {}))) for row in rows]
    write_jsonl(work / SCORED_FILE, scored)
    write_jsonl(work / "selected.jsonl", [as_selected(usable[i], rewards[i]) for i in selected])
    report = report_of(rows, usable, rewards, selected)
    if config.min_reward is not None:
        report["below_min_reward"] = sum(reward < config.min_reward for reward in rewards)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.remove()
    folder = commit_output(config.output_dir, config.overwrite)
    print(in_words(report) + f"\nsaved to {folder / 'selected.jsonl'}, which rlhf sft takes as --dataset")
    return folder


def files_in(names: Sequence[str], file_name: str, key: str) -> list[str]:
    """Files as they are, of folders the one of that name; UsageError where one is there twice."""
    files = [str(Path(name) / file_name) if Path(name).is_dir() else name for name in names]
    places = Counter(Path(file).resolve() for file in files)
    twice = [str(place) for place, times in places.items() if times > 1]
    if twice:
        raise UsageError(f"{key}: {twice[0]} is there twice")
    return files


def read_completions(file: str, tokenizers: Sequence[PreTrainedTokenizerBase], max_length: int) -> list[Row]:
    """All rows; UsageError naming those that are not completions. `model` is text, by default the file's name;
    `finished` true or false, by default true; `columns` a mapping, by default an empty one."""
    return read_checked(
        file, lambda number, row: checked_row(file, number, row, tokenizers, max_length), "completions",
        "rows with prompt and completion, as `rlhf sample` writes them",
    )  # fmt: skip


def checked_row(
    file: str, number: int, row: dict[str, Any], tokenizers: Sequence[PreTrainedTokenizerBase], max_length: int
) -> Row:
    for field in ("prompt", "completion"):
        if row.get(field) is None:
            raise RowError(field, f"missing; the row has: {', '.join(row)}")
    model, finished = row.get("model", file), row.get("finished", True)
    columns = {} if row.get("columns") is None else row["columns"]
    if not isinstance(model, str):
        raise RowError("model", f"expected text, got {kind(model)}")
    if not isinstance(finished, bool):
        raise RowError("finished", f"expected true or false, got {kind(finished)}")
    if not isinstance(columns, dict):
        raise RowError("columns", f"expected a mapping, got {kind(columns)}")
    prompt, completion = row["prompt"], row["completion"]
    check_prompt(prompt)
    ids = [encode_prompt(tokenizer, prompt) for tokenizer in tokenizers]
    if is_empty(completion):
        return Row(file, number, prompt, completion, model, finished, columns, ids, EMPTY)
    check_response(prompt, completion, "completion")
    for tokenizer, sequence in zip(tokenizers, ids, strict=True):
        sequence += encode_response(tokenizer, prompt, completion, "completion")
    is_long = any(len(sequence) > max_length for sequence in ids)
    problem = UNFINISHED if not finished else TOO_LONG if is_long else None
    return Row(file, number, prompt, completion, model, finished, columns, ids, problem)


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_scored(row: Row, reward: float | None, parts: dict[str, float]) -> dict[str, Any]:
    """A line of scored.jsonl: `reward` is null where `left_out` says why; of several functions, `rewards` has each."""
    return {
        "prompt": row.prompt, "completion": row.completion, "model": row.model, "finished": row.finished,
        "reward": reward, "left_out": row.left_out,
    } | ({"rewards": parts} if len(parts) > 1 else {})  # fmt: skip


def as_selected(row: Row, reward: float) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": row.completion, "reward": reward, "model": row.model}


def left_out(rows: Sequence[Row]) -> dict[str, int]:
    counts = Counter(row.left_out for row in rows)
    return {reason: counts[reason] for reason in (UNFINISHED, EMPTY, TOO_LONG)}


def report_of(
    rows: Sequence[Row], usable: Sequence[Row], rewards: Sequence[float], selected: Sequence[int]
) -> dict[str, Any]:
    """Counts and mean rewards, of all candidates and of those selected, in all and by model."""

    def share(positions: Sequence[int]) -> dict[str, Any]:
        mean = sum(rewards[i] for i in positions) / len(positions) if positions else None
        prompts = len({usable[i].prompt_key for i in positions})
        return {"completions": len(positions), "prompts": prompts, "mean_reward": mean}

    def by_model(positions: Sequence[int]) -> dict[str, Any]:
        return {name: share([i for i in positions if usable[i].model == name]) for name in models}

    models, everything = sorted({row.model for row in rows}), range(len(usable))
    return {
        "completions": len(rows),
        "prompts": len({row.prompt_key for row in rows}),
        "left_out": left_out(rows),
        "candidates": share(everything) | {"by_model": by_model(everything)},
        "selected": share(selected) | {"by_model": by_model(selected)},
    }


def in_words(report: dict[str, Any]) -> str:
    candidates, selected = report["candidates"], report["selected"]
    return (
        f"{report['completions']} completions of {report['prompts']} prompts, left out: "
        f"{in_numbers(report['left_out'])}\n"
        f"candidates: {candidates['completions']} of {candidates['prompts']} prompts, "
        f"mean reward {candidates['mean_reward']:+.4f}\n"
        f"selected:   {selected['completions']} of {selected['prompts']} prompts, "
        + (f"mean reward {selected['mean_reward']:+.4f}" if selected["completions"] else "none has min_reward")
    )


def in_numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
