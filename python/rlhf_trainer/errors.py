"""The errors that a user, not a programmer, has to act on, and what their messages share."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# What files of others make their readers raise: values of other types, too deep, too large, empty.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class UsageError(ValueError):
    """Wrong input: a configuration, a data set, a model or a folder. The command line prints it without a traceback."""


class TrainingError(RuntimeError):
    """A run that cannot go on: its loss, a gradient or a weight is not finite. Printed without a traceback, too."""


class RowError(ValueError):
    """One row cannot be used; `field` says where."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


def kind(value: Any) -> str:
    """The kind of a value, for messages: "text", "a list", "int 5"."""
    names = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean 'beta'?" for the known name nearest to `name`, else nothing; `prefix` goes before that name."""
    known = sorted(known, key=len)
    nearest = [
        *(other for other in known if name and other.startswith(name)),
        *get_close_matches(name, known, n=1),
        *(other for other in known if name.startswith(other)),
        *(other for other in known if len(name) > 3 and name in other),
    ]
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""
