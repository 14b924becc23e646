"""Packages that cannot be installed beside the others, as they ask for other versions of what is here. Each lies in a
folder of its own, build/peers/<name>-<version> (`make peers`), and is imported from there."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.harness.peers import ROOT


def folder_of(package: str) -> Path:
    """The newest build/peers/<package>-*."""
    folders = sorted((ROOT / "build/peers").glob(f"{package}-*"))
    if not folders:
        missing = f"build/peers/{package}-*"
        raise ModuleNotFoundError(f"{package} is not installed in build/peers: make hosts", name=missing)
    return folders[-1]


def without_init(package: str, module: str) -> ModuleType:
    """<package>.<module> of the folder, without what the packages it lies in would import in their __init__.py."""
    folder, names = folder_of(package), [package, *module.split(".")]
    for k in range(1, len(names)):
        parent = ".".join(names[:k])
        if parent not in sys.modules:
            shell = sys.modules[parent] = ModuleType(parent)
            shell.__path__ = [str(folder.joinpath(*names[:k]))]
    return importlib.import_module(".".join(names))
