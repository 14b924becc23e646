"""`rlhf rejection`: rejection sampling. Completions get rewards, and the best are kept to be learned by SFT.

Rewards make a matrix, prompts by completions (a ragged one: numbers may differ). `top_per_prompt` takes the best of
each row (k = 1: best of N), so every prompt is represented; `top_k_overall` the best of the whole matrix, so prompts
with high rewards are represented more often; `random` as many of each row as `top_per_prompt`, to tell what choosing
by reward is worth. With `min_reward`, only completions with at least that reward can be selected: those that are right,
say, where the reward is a verifiable one (DeepSeek-R1 makes its data for SFT in this way).

Left out, and counted, is what must not be learned: a completion that did not end within max_new_tokens (SFT would put
an end behind it and teach to stop in mid-sentence), an empty one, and one that is longer than max_length to a reward
model.
"""

import itertools
import json
import math
import random
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.completions import (
    COMPLETIONS_FILE,
    SCORED_FILE,
    Row,
    as_scored,
    as_selected,
    files_in,
    in_numbers,
    left_out,
    read_completions,
    text_of,
)
from ..data.examples import Prompt
from ..errors import UsageError
from ..models.checks import check_fit
from ..training.journal import Journal, write_jsonl
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import RejectionConfig
from .loading import load_rewards


class Candidate(NamedTuple):
    """A completion that may be selected: the key of its prompt, a row of the matrix, and its value."""

    prompt: Hashable
    reward: float


def select(
    candidates: Sequence[Candidate], selection: str, k: int, *, max_per_prompt: int | None = None,
    min_reward: float | None = None, seed: int = 0,
) -> list[int]:  # fmt: skip
    """Positions of what is selected: k of each prompt, prompts as they appear, the best first ("random": drawn without
    regard to rewards, as they appear); or "top_k_overall", the k best of each prompt's `max_per_prompt` best.

    Of equal rewards the earlier candidate is the better one. Those below `min_reward` are not selected.
    """
    of_prompts: dict[Hashable, list[int]] = {}
    for i, candidate in enumerate(candidates):
        if min_reward is None or candidate.reward >= min_reward:
            of_prompts.setdefault(candidate.prompt, []).append(i)

    def best_first(positions: Iterable[int]) -> list[int]:
        return sorted(positions, key=lambda i: (-candidates[i].reward, i))

    if selection == "top_k_overall":
        return best_first(i for positions in of_prompts.values() for i in best_first(positions)[:max_per_prompt])[:k]
    if selection == "top_per_prompt":
        return [i for positions in of_prompts.values() for i in best_first(positions)[:k]]
    rng = random.Random(seed)
    return [i for positions in of_prompts.values() for i in sorted(rng.sample(positions, min(k, len(positions))))]


def rejection(config: RejectionConfig) -> Path:
    """Writes scored.jsonl (all), selected.jsonl (for SFT) and report.json into output_dir, which it returns."""
    device = single_process("rlhf rejection")
    if not begin(config):
        return Path(config.output_dir)
    files = files_in(config.completions, COMPLETIONS_FILE, "completions")
    reward = load_rewards(config, device, batch_size=config.per_device_eval_batch_size)
    codecs = [model.codec for model in reward.models]
    rows = [row for file in files for row in read_completions(file, codecs, config.max_length)]
    usable = [row for row in rows if row.left_out is None]
    if not usable:
        raise UsageError(f"completions: none of {len(rows)} can be selected ({in_numbers(left_out(rows))})")
    prompts = [Prompt(row.number, row.prompt, [], None, row.columns, row.opening) for row in usable]
    texts = [text_of(row.completion) for row in usable]
    for file, group in itertools.groupby(range(len(usable)), key=lambda i: usable[i].source):
        places = list(group)
        for j, model in enumerate(reward.models):
            lengths = [len(usable[i].ids[j]) for i in places]
            check_fit(model.model, model.tokenizer, [usable[i].number for i in places], lengths, file)
        reward.check([prompts[i] for i in places], file)

    work = open_output(config)
    data = [(row.ids, row.prompt_key, text, row.columns) for row, text in zip(usable, texts, strict=True)]
    batches = reward.batch_count(prompts, texts)
    with Journal(work / "progress.jsonl", batches, "rlhf rejection", data) as progress:
        scores = reward(prompts, texts, run=progress.run)
    rewards = scores.total.tolist()
    selected = select(
        [Candidate(row.prompt_key, reward) for row, reward in zip(usable, rewards, strict=True)], config.selection,
        config.k, max_per_prompt=config.max_per_prompt, min_reward=config.min_reward, seed=config.seed,
    )  # fmt: skip
    parts = [
        {name: None if math.isnan(value) else value for name, value in zip(reward.names, values, strict=True)}
        for values in scores.parts.tolist()
    ]
    known = iter(zip(rewards, parts, strict=True))
    scored = [as_scored(row, *(next(known) if row.left_out is None else (None, {}))) for row in rows]
    write_jsonl(work / SCORED_FILE, scored)
    write_jsonl(work / "selected.jsonl", [as_selected(usable[i], rewards[i]) for i in selected])
    report = report_of(rows, usable, rewards, selected)
    if config.min_reward is not None:
        report["below_min_reward"] = sum(reward < config.min_reward for reward in rewards)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.remove()
    folder = commit_output(config)
    print(in_words(report) + f"\nsaved to {folder / 'selected.jsonl'}, which rlhf sft takes as --dataset_name")
    return folder


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
