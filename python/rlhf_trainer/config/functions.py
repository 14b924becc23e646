"""Functions of the user's own, named as `module:function`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..errors import UsageError, kind


def import_function(spec: str, where: str) -> Callable[..., Any]:
    """The function that `spec`, "module:function", names, of an installed module or one in the working directory;
    UsageError, beginning with `where`, if there is none."""
    module, _, name = spec.partition(":")
    if module.endswith(".py"):
        raise UsageError(f"{where} {spec!r}: a module is named without .py: {module.removesuffix('.py')}:{name}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise UsageError(
            f"{where} {spec!r}: cannot import {module!r}, from {os.getcwd()} or what is installed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(imported, name):
        raise UsageError(f"{where} {spec!r}: {module!r} ({getattr(imported, '__file__', 'built in')}) has no {name!r}")
    function = getattr(imported, name)
    if not callable(function):
        raise UsageError(f"{where} {spec!r}: expected a function, got {kind(function)}")
    return function
