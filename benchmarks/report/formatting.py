"""Numbers and tables in Markdown."""

from collections.abc import Callable, Iterable

from benchmarks.harness.measuring import BARE


def short(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 10:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.1%}"


def both(row: dict, columns: tuple[str, str], word_for: Callable[[float | None], str]) -> str:
    """ "forward / total"; "" where neither is known."""
    words = [word_for(row.get(column)) for column in columns]
    return " / ".join(word or "–" for word in words) if any(words) else ""


def nats(error: float | str | None) -> str:
    return "" if error is None else f"{float(error):.1e}" if error else "0"  # "nan" stays one


def spread(times: dict | None) -> str:
    return f"{times['min'] / times['median']:.2f}–{times['max'] / times['median']:.2f}" if times else ""


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def grid(head: list[str], lines: Iterable[list[str]], text_columns: int = 1) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return [f"| {' | '.join(line)} |" for line in [head, rule, *lines]] + [""]


def error_of(row: dict) -> str:
    """The error of a measured row; a table without it is not printed."""
    if row["contender"] == BARE or row["contender"].endswith(", unmasked"):
        return ""  # yardsticks: bare GEMMs compute nothing that has a truth, unmasked rows are another case
    if row.get("max_error") is not None:
        return nats(row["max_error"])
    if row["contender"].endswith(", sum") and row.get("hidden_gradient_error") is not None:
        return "no value per token"  # its gradient is judged
    raise ValueError(f"measured without an error, so not printed: {row['contender']} of {row['op']}")
