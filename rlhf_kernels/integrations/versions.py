"""Refusing hosts that are not what they were when their integration was written."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def check_version(package: str, known: Sequence[str]) -> None:
    """Raises ImportError where the installed `package` is not one of the `known` versions."""
    installed = importlib.metadata.version(package)
    if installed not in known:
        raise ImportError(
            f"{package} {installed} is not known here: known are {', '.join(known)}. Install one of them "
            f"(pip install {package}=={known[-1]}), or use {package} as it is"
        )


def check_parameters(function: Callable[..., Any], expected: str) -> None:
    """Raises ImportError where a function of a host does not take `expected`, its parameters joined by ", "; "..." at
    the end is anything more."""
    actual = ", ".join(inspect.signature(function).parameters)
    known = expected.removesuffix("...")
    if actual != expected and not (known != expected and f"{actual}, ".startswith(known)):
        raise ImportError(
            f"{function.__module__}.{function.__qualname__} takes ({actual}), expected ({expected}): another patch of "
            "it, or a version that needs another rlhf_kernels"
        )
