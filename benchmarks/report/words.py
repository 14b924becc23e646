"""Numbers and tables in words, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.1%}"


def both(row: dict, columns: tuple[str, str], say: Callable[[float | None], str]) -> str:
    """ "forward / total"; "" where neither is known."""
    said = [say(row.get(column)) for column in columns]
    return " / ".join(word or "–" for word in said) if any(said) else ""


def nats(error: float | str | None) -> str:
    return "" if error is None else f"{float(error):.1e}" if error else "0"  # "nan" stays one


def spread(times: dict | None) -> str:
    return f"{times['min'] / times['median']:.2f}–{times['max'] / times['median']:.2f}" if times else ""


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def grid(head: list[str], lines: Iterable[list[str]], text_columns: int = 1) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return [f"| {' | '.join(line)} |" for line in [head, rule, *lines]] + [""]
