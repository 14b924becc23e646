"""Packages that cannot be installed beside the others: a second version of one, or one that asks for other versions of
what is here. Each lies in a folder of its own, build/peers/<name>-<version> (`make peers`), and is imported from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent.parent / "build/peers"


def folder_of(package: str) -> Path:
    """The newest build/peers/<package>-*."""
    found = sorted(FOLDER.glob(f"{package}-*"))
    if not found:
        missing = f"build/peers/{package}-*"
        raise ModuleNotFoundError(f"{package} is not installed in build/peers: make hosts", name=missing)
    return found[-1]


def beside(package: str, module: str) -> ModuleType:
    """<package>.<module> of the folder, under a name that leaves an installed package of that name alone. Imports
    inside the package must be relative."""
    alias = f"overlay_{package}"
    if alias not in sys.modules:
        path = folder_of(package) / package
        spec = importlib.util.spec_from_file_location(
            alias, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None and spec.loader is not None
        loaded = sys.modules[alias] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[alias]  # or the next import would find half a module
            raise
    return importlib.import_module(f"{alias}.{module}")


def without_init(package: str, module: str) -> ModuleType:
    """<package>.<module> of the folder, without what the packages it lies in would import in their __init__.py."""
    name = f"{package}.{module}"
    root = folder_of(package)
    for k, _ in enumerate(name.split(".")[:-1]):
        parent = ".".join(name.split(".")[: k + 1])
        if parent not in sys.modules:
            shell = sys.modules[parent] = ModuleType(parent)
            shell.__path__ = [str(root / parent.replace(".", "/"))]
    return importlib.import_module(name)
