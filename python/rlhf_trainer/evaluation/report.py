"""The report of `rlhf evaluate`, from its samples: numbers with intervals, and a table for a person."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .config import EvaluateConfig
from .intervals import bootstrap_interval, wilson_interval


def report_of(config: EvaluateConfig, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and an Interval (as a mapping; None where nothing could be measured) of each measure."""
    compared = [sample for sample in samples if sample["answer_reward"] is not None]
    scores = [outcome(sample["reward"], sample["answer_reward"]) for sample in compared]

    def mean(values: Iterable[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        return bootstrap_interval(known, config.resamples, config.seed)._asdict() if known else None

    return {
        "model": config.model_name_or_path,
        "ref_model": config.ref_model_name_or_path,
        "reward_model": config.reward_model_name_or_path,
        "reward_funcs": config.reward_funcs,
        "dataset": config.dataset_name,
        "prompts": len(samples),
        "unfinished": sum(not sample["finished"] for sample in samples),
        "empty": sum(sample["reward"] is None for sample in samples),
        "wins": scores.count(1.0),
        "ties": scores.count(0.5),
        "losses": scores.count(0.0),
        "intervals": f"95%; win_rate: Wilson's; others: bootstrap over prompts, {config.resamples} resamples",
        "win_rate": wilson_interval(sum(scores) / len(scores), len(scores))._asdict() if scores else None,
        "reward": mean(sample["reward"] for sample in samples),
        "answer_reward": mean(sample["answer_reward"] for sample in samples),
        "reward_gain": mean(s["reward"] - s["answer_reward"] for s in compared if s["reward"] is not None),
        "length_tokens": mean(sample["tokens"] for sample in samples),
        "answer_length_tokens": mean(sample["answer_tokens"] for sample in samples),
        "kl_nats": mean(sample["kl_nats"] for sample in samples),
    }


def outcome(reward: float | None, answer_reward: float) -> float:
    """1 for a win, 1/2 for a tie, 0 for a loss; without a reward, as an empty answer is, the model loses."""
    if reward is None:
        return 0.0
    return 0.5 if reward == answer_reward else float(reward > answer_reward)


def table(report: dict[str, Any]) -> str:
    """The report as text, for a person."""
    return filled(Path(__file__).with_name("report.txt.jinja"), **report)


def filled(template: Path, **values: Any) -> str:
    """The text that a Jinja template makes of the values; a line that is nothing but a statement leaves none."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values).rstrip("\n")
