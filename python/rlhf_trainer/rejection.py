"""`rlhf reject`: rejection sampling. A reward model scores completions, and the best are kept to be learned by SFT.

Rewards make a matrix, prompts by completions (a ragged one: numbers may differ). `top_per_prompt` takes the best of
each row (k = 1: best of N), so every prompt is represented; `top_overall` the best of the whole matrix, so prompts
that the reward model likes are represented more often; `random` as many of each row as `top_per_prompt`, to tell what
the reward model's choice is worth.

Left out, and counted, is what must not be learned: a completion that did not end within max_new_tokens (SFT would put
an end behind it and teach to stop in mid-sentence), an empty one, and one that is longer than max_length.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import RowError, kind
from .checkpoint import commit_output, open_output
from .config import RejectConfig
from .config_file import dump_yaml
from .data import encode_prompt, encode_response
from .errors import UsageError
from .models import check_fit, load_tokenizer, pad_id_of
from .progress import Progress, begin, write_jsonl
from .rows import RowProblem, listing, read_rows
from .sampling import COMPLETIONS_FILE, is_empty
from .scoring import batch_count, load_reward_model, score_sequences

UNFINISHED, EMPTY, TOO_LONG = "unfinished", "empty", "too long"


class Row(NamedTuple):
    """A completion as it was read; `ids`: prompt and completion as the reward model's tokenizer makes them."""

    source: str
    number: int
    prompt: Any
    completion: Any
    model: str
    finished: bool
    ids: list[int]
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
    tokenizer = load_tokenizer(config.reward_model, key="reward_model", trust_remote_code=config.trust_remote_code)
    rows = [row for file in files_of(config) for row in read_completions(file, tokenizer, config.max_length)]
    usable = [row for row in rows if row.left_out is None]
    if not usable:
        raise UsageError(f"completions: none of {len(rows)} can be selected ({in_numbers(left_out(rows))})")
    model = load_reward_model(
        config.reward_model, key="reward_model", attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    for file, group in itertools.groupby(usable, key=lambda row: row.source):
        numbers, lengths = zip(*((row.number, len(row.ids)) for row in group), strict=True)
        check_fit(model, tokenizer, numbers, lengths, file)

    work = open_output(config.output_dir, config.overwrite, dump_yaml(config), config.resume)
    sequences = [row.ids for row in usable]
    batches = batch_count(sequences, config.batch_size)
    with Progress(work / "progress.jsonl", batches, "rlhf reject", sequences) as progress:
        rewards = score_sequences(
            model, sequences, config.batch_size, pad_id_of(tokenizer), device, bf16=config.precision == "bf16",
            run=progress.run,
        ).tolist()  # fmt: skip
    prompts = {name: i for i, name in enumerate(dict.fromkeys(row.prompt_key for row in usable))}
    candidates = [Candidate(prompts[row.prompt_key], reward) for row, reward in zip(usable, rewards, strict=True)]
    selected = select(config, candidates)

    known = iter(rewards)
    scored = [as_scored(row, next(known) if row.left_out is None else None) for row in rows]
    write_jsonl(work / "scored.jsonl", scored)
    write_jsonl(work / "selected.jsonl", [as_selected(usable[i], rewards[i]) for i in selected])
    report = report_of(rows, usable, rewards, selected)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.remove()
    folder = commit_output(config.output_dir, config.overwrite)
    print(in_words(report) + f"\nsaved to {folder / 'selected.jsonl'}, which rlhf sft takes as --dataset")
    return folder


def files_of(config: RejectConfig) -> list[str]:
    """Files as they are, of folders their completions.jsonl; UsageError where one is there twice."""
    files = [str(Path(name) / COMPLETIONS_FILE) if Path(name).is_dir() else name for name in config.completions]
    places = Counter(Path(file).resolve() for file in files)
    twice = [str(place) for place, times in places.items() if times > 1]
    if twice:
        raise UsageError(f"completions: {twice[0]} is there twice")
    return files


def read_completions(file: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """All rows; UsageError naming those that are not completions. `model` is text, by default the file's name;
    `finished` true or false, by default true."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, row in read_rows(file, split="train"):
        try:
            rows.append(checked_row(file, number, row, tokenizer, max_length))
        except RowError as error:
            problems.append(f"row {number}, {error}")
    if problems:
        raise UsageError(f"{file}: {len(problems)} rows are not completions:\n{listing(problems)}")
    if not rows:
        raise UsageError(f"{file} is empty: expected rows with prompt and completion, as `rlhf sample` writes them")
    return rows


def checked_row(file: str, number: int, row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    if isinstance(row, RowProblem) or not isinstance(row, dict):
        raise RowError("row", row if isinstance(row, RowProblem) else f"expected a mapping, got {kind(row)}")
    for field in ("prompt", "completion"):
        if row.get(field) is None:
            raise RowError(field, f"missing; the row has: {', '.join(row)}")
    model, finished = row.get("model", file), row.get("finished", True)
    if not isinstance(model, str):
        raise RowError("model", f"expected text, got {kind(model)}")
    if not isinstance(finished, bool):
        raise RowError("finished", f"expected true or false, got {kind(finished)}")
    prompt, completion = row["prompt"], row["completion"]
    ids, problem = encode_prompt(tokenizer, prompt), None
    if is_empty(completion):
        problem = EMPTY
    else:
        ids += encode_response(tokenizer, prompt, completion, "completion")
        problem = UNFINISHED if not finished else TOO_LONG if len(ids) > max_length else None
    return Row(file, number, prompt, completion, model, finished, ids, problem)


def as_scored(row: Row, reward: float | None) -> dict[str, Any]:
    """A line of scored.jsonl: `reward` is null where `left_out` says why."""
    return {
        "prompt": row.prompt, "completion": row.completion, "model": row.model, "finished": row.finished,
        "reward": reward, "left_out": row.left_out,
    }  # fmt: skip


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
        f"mean reward {selected['mean_reward']:+.4f}"
    )


def in_numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
