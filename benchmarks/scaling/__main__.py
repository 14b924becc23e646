"""`python -m benchmarks.scaling`: the tables of docs/scaling.md, between their markers, and docs/images/growth.svg."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.peers import ROOT
from benchmarks.scaling.cost_model import op_table, parallel_table
from benchmarks.scaling.growth import draw, evidence_tables, growth_tables
from benchmarks.scaling.plans import plan_table

RESULTS, PAGE, PICTURE = ROOT / "benchmarks/results", ROOT / "docs/scaling.md", ROOT / "docs/images/growth.svg"


def load(folder: Path = RESULTS) -> dict[str, dict]:
    """Name -> results that have swept rows, the newest first."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("cpu-*.json"))}
    swept = {name: results for name, results in files.items() if any(row.get("sweep") for row in results["rows"])}
    return dict(sorted(swept.items(), key=lambda file: file[1]["measured"], reverse=True))


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """`text` with new lines between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin} and {end} must each be there once")
    body = "\n".join([begin, "", *lines]).rstrip() + "\n\n"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body + end, text, flags=re.DOTALL)


def written(text: str, files: dict[str, dict]) -> str:
    """docs/scaling.md as the results say it."""
    evidence = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("evidence-*.json"))]
    tables = {"growth": growth_tables(files), "evidence": evidence_tables(evidence)}
    tables |= {"ops": op_table(), "parallel": parallel_table(), "plans": plan_table()}
    for name, lines in tables.items():
        text = replaced(text, name, lines)
    return text


def write() -> None:
    files = load()
    PAGE.write_text(written(PAGE.read_text(), files))
    if files:
        draw(next(iter(files.values())), PICTURE)


if __name__ == "__main__":
    write()
