"""`rlhf pairs`: preferences of scored completions, to be learned by `rlhf dpo` or `rlhf reward`.

A row of pairs.jsonl is a prompt with its distinct completions, their rewards, and which is better than which. (Tulu 3
makes its preferences in this way, of the completions of many models, and online DPO in each round.)
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.completions import PAIRS_FILE, SCORED_FILE, files_in, in_numbers, read_scored
from ..errors import UsageError
from ..training.journal import write_jsonl
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import Pairing, PairsConfig

EQUAL, TOO_FEW = "equal rewards", "fewer than two usable completions"  # reasons for a prompt without a pair


def make_pairs(config: PairsConfig) -> Path:
    """Writes pairs.jsonl and report.json into output_dir, which it returns."""
    single_process("rlhf pairs")
    if not begin(config):
        return Path(config.output_dir)
    lines = [line for file in files_in(config.scored, SCORED_FILE, "scored") for line in read_scored(file)]
    rows, without = pair_up(lines, config.pairing)
    if not rows:
        raise UsageError(
            "scored: no prompt gives a pair, which takes two completions with different rewards "
            f"(prompts: {in_numbers(without)})"
        )
    report = {
        "completions": len(lines),
        "prompts": len(rows) + sum(without.values()),
        "pairs": sum(len(row["pairs"]) for row in rows),
        "prompts_without_pair": without,
    }
    work = open_output(config)
    write_jsonl(work / PAIRS_FILE, rows)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    folder = commit_output(config)
    print(
        f"{report['pairs']} pairs of {report['prompts']} prompts (without a pair: {in_numbers(without)})\n"
        f"saved to {folder / PAIRS_FILE}, which rlhf dpo and rlhf reward take as --dataset_name"
    )
    return folder


def pair_up(scored: Sequence[dict[str, Any]], pairing: Pairing) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Lines of scored.jsonl -> rows of pairs.jsonl, one of each prompt that gives pairs; and the numbers of
    prompts that give none, by reason.

    Completions that were left out have no reward and are in no pair. Equal completions are one response.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in scored:
        groups.setdefault(json.dumps(line["prompt"], sort_keys=True), []).append(line)
    rows: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for group in groups.values():
        usable = [line for line in group if line["reward"] is not None]
        distinct: dict[str, dict[str, Any]] = {}
        for line in usable:
            distinct.setdefault(json.dumps(line["completion"], sort_keys=True), line)
        responses = [line["completion"] for line in distinct.values()]
        scores = [line["reward"] for line in distinct.values()]
        pairs = pairs_among(scores, pairing)
        if pairs:
            rows.append({"prompt": group[0]["prompt"], "responses": responses, "scores": scores, "pairs": pairs})
        else:
            without[EQUAL if len(usable) > 1 else TOO_FEW] += 1
    return rows, {reason: without[reason] for reason in (EQUAL, TOO_FEW)}


def pairs_among(rewards: Sequence[float], pairing: Pairing) -> list[tuple[int, int]]:
    """Positions of (better, worse), the best ones first; none where all are equal.

    best_worst: the best and the worst; of equal rewards, the earlier is the better one, as for `rlhf rejection`. all:
    any two whose rewards differ.
    """
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])  # stable: of equal rewards the earlier one first
    pairs = zip(order[:1], order[-1:], strict=True) if pairing == "best_worst" else itertools.combinations(order, 2)
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]
