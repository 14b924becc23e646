"""The columns of a plain row, checked: each wrong value is a RowError that names the field."""

import math
from typing import Any

from ..errors import RowError, kind


def expect(field: str, value: Any, types: Any, expected: str) -> Any:
    """The value, if it is of these types; else RowError with what was expected, in words."""
    if not isinstance(value, types):
        raise RowError(field, f"expected {expected}, got {kind(value)}")
    return value


def need(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError(column, f"missing; the row has: {', '.join(row) or 'nothing'}")
    return row[column]


def need_any(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """The first of these columns that the row has."""
    for column in columns:
        if column in row:
            return column
    others = " or ".join(map(repr, columns[1:]))
    raise RowError(columns[0], f"missing, with no {others} either; the row has: {', '.join(row) or 'nothing'}")


def need_text(row: dict[str, Any], column: str) -> str:
    return expect(column, need(row, column), str, "text")


def need_list(row: dict[str, Any], column: str) -> list[Any]:
    value = need(row, column)
    if not isinstance(value, list) or not value:
        raise RowError(column, f"expected a list that is not empty, got {kind(value)}")
    return value


def number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise RowError(field, f"expected a finite number, got {kind(value)}")
    return float(value)


Response = tuple[str, Any]  # the field it stands in, text or messages


def comparisons(row: dict[str, Any]) -> list[tuple[Response, Response, float]]:
    """(better, worse, margin) of `chosen` and `rejected`, or of `responses` by their `pairs` or `scores`.

    The margin is what the row calls one. Differences of scores are none: their unit is the scorer's, not nats.
    """
    if "flipped" in row and row.get("verdict") in ("tie", "unparsed"):
        raise RowError("verdict", f"{row['verdict']}: no preference; --skip_invalid_rows leaves such rows out")
    if "responses" not in row:
        chosen, rejected = (("chosen", need(row, "chosen")), ("rejected", need(row, "rejected")))
        margin = number("margin", row.get("margin", 0.0))
        if margin < 0:
            raise RowError("margin", f"expected by how much 'chosen' is better, got {margin:g}")
        return [(chosen, rejected, margin)]
    responses = [(f"responses[{i}]", response) for i, response in enumerate(need_list(row, "responses"))]
    if need_any(row, ("pairs", "scores")) == "pairs":
        pairs = [_positions(f"pairs[{i}]", pair, len(responses)) for i, pair in enumerate(need_list(row, "pairs"))]
    else:
        scores = [number(f"scores[{i}]", score) for i, score in enumerate(need_list(row, "scores"))]
        if len(scores) != len(responses):
            raise RowError("scores", f"expected one for each of the {len(responses)} responses, got {len(scores)}")
        places = range(len(scores))
        pairs = [(i, j) for i in places for j in places if scores[i] > scores[j]]
        if not pairs:
            raise RowError("scores", "all are equal: no response is better than another")
    return [(responses[i], responses[j], 0.0) for i, j in pairs]


def _positions(field: str, pair: Any, count: int) -> tuple[int, int]:
    good = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and 0 <= i < count for i in pair)
    if not good or pair[0] == pair[1]:
        raise RowError(field, f"expected [winner, loser], two positions from 0 to {count - 1}, got {pair!r}")
    return pair[0], pair[1]
