"""The report of a recipe: the inputs, outputs and numbers of its stages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..commands import COMMANDS
from ..config.base import names_with
from ..evaluation.report import filled, table
from .file import REFERENCE, Recipe, Stage, placed

METRICS_FILE, REPORT_FILE = "metrics.jsonl", "report.json"
TEMPLATE = Path(__file__).with_name("report.md.jinja")
NOT_SHOWN = ("step", "epoch", "tokens_per_second", "learning_rate")


def report_of(recipe: Recipe, work: Path, done: dict[str, Any]) -> dict[str, Any]:
    """done: by stage, its seconds, and whether an interrupted run had begun it."""
    stages = [stage_report(stage, work) | done[stage.name] for stage in recipe.stages]
    return {
        "title": recipe.title,
        "source": recipe.source,
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "stages": stages,
    }


def stage_report(stage: Stage, work: Path) -> dict[str, Any]:
    folder = work / stage.name
    report: dict[str, Any] = {
        "stage": stage.name,
        "what": stage.what,
        "consumed": consumed(stage, work),
        "rows": {path.name: count for path in sorted(folder.glob("*.jsonl")) if (count := rows_of(path)) is not None},
    }
    if (folder / METRICS_FILE).exists():
        report |= course(folder / METRICS_FILE)
    if (folder / REPORT_FILE).exists():
        report["report"] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return report


def consumed(stage: Stage, work: Path) -> dict[str, Any]:
    """The stage's inputs by key: from outside, or from an earlier stage; files with their rows."""
    inputs = names_with(COMMANDS[stage.what].load_config(), "names_input") if stage.kind == "command" else []
    sources = {}
    for key, value in placed(stage, work).items():
        option = json.dumps(stage.options[key])
        if value is None or (key not in inputs and not REFERENCE.search(option)) or "${output}" in option:
            continue
        for name, source in leaves(key, value):
            rows = rows_of(Path(source))
            sources[name] = {"from": source} | ({} if rows is None else {"rows": rows})
    return sources


def leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value, by their path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(f"{name}.{i + 1}" if len(value) > 1 else name, item)
    elif isinstance(value, str):
        yield name, value


def rows_of(path: Path) -> int | None:
    """Lines of a JSONL file of data."""
    if path.suffix != ".jsonl" or path.name == METRICS_FILE or not path.is_file():
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def course(path: Path) -> dict[str, Any]:
    """The number of steps in metrics.jsonl, and each metric at its first and last mention."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    metrics: dict[str, dict[str, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in NOT_SHOWN:
                metrics.setdefault(name, {"first": value})["last"] = value
    return {"steps": records[-1]["step"] if records else 0, "metrics": metrics}


def in_markdown(report: dict[str, Any]) -> str:
    """Of a stage its metrics and its own report: rlhf evaluate's table; a table of like mappings; or the numbers."""
    return filled(TEMPLATE, **report, numbers_of=numbers_of, are_alike=are_alike, table=table) + "\n"


def are_alike(parts: list[Any]) -> bool:
    """Whether these are mappings with the same keys."""
    return bool(parts) and all(isinstance(part, dict) and part and part.keys() == parts[0].keys() for part in parts)


def numbers_of(report: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and texts by their path; lists are for report.json."""
    for key, value in report.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{key}, ")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{key}", value
