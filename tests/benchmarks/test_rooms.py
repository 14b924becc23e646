"""The rooms of benchmarks/: harness < the others < entries. No file imports a higher room, none a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEIGHTS = {"harness": 0, "report": 1, "steps": 1, "guard": 1, "scaling": 2}  # scaling shows tables as report does
ENTRIES = 3


def imports_of(path):
    """The modules of benchmarks that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
        yield from (module for module in modules if module.startswith("benchmarks."))


def test_no_arrow_runs_up_and_none_in_a_circle():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "benchmarks").rglob("*.py")
    }
    arrows = {}
    for module, path in files.items():
        names = [name if name in files else name.rpartition(".")[0] for name in imports_of(path)]
        arrows[module] = {name for name in names if name in files}

    def height(module):
        return HEIGHTS.get(module.split(".")[1], ENTRIES)

    up = [(module, name) for module, names in arrows.items() for name in names if height(name) > height(module)]
    assert up == []
    beside = [
        (module, name)
        for module, names in arrows.items()
        for name in names
        if height(name) == height(module) == 1 and name.split(".")[1] != module.split(".")[1]
    ]
    assert beside == []
    assert len(list(TopologicalSorter(arrows).static_order())) == len(files)  # it raises CycleError
