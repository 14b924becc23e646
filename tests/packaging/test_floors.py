"""The floors of the house: csrc < rlhf_kernels < rlhf_trainer. None may know of one above it."""

import ast
import re
from pathlib import Path

import pytest

import rlhf_kernels

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "rlhf_kernels").rglob("*.py"))
TRAINER = sorted((ROOT / "python" / "rlhf_trainer").rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
PUBLIC_INTEGRATIONS = ("rlhf_kernels.integrations.lm_head", "rlhf_kernels.integrations.transformers")
MAX_LINES = 450


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(tree):
    """(module, names) of every absolute import; `import a.b` is ("a.b", [])."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, [alias.name for alias in node.names]


def lazy_nodes(tree):
    """Everything that runs only when a function is called, or never (`if TYPE_CHECKING:`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            yield from ast.walk(node)


def top(module):
    return module.split(".")[0]


@pytest.mark.parametrize("path", CSRC, ids=name_of)
def test_csrc_knows_no_python(path):
    """Only the bindings may speak to Python, and even they import nothing from it."""
    text = path.read_text()
    assert not re.search(r"module_?::import|PyImport_", text)
    if path.name != "bindings.cpp":
        assert not re.search(r"#include\s*[<\"](Python\.h|pybind11/|torch/extension\.h|torch/python\.h)", text)


def imported_on_demand(path):
    """Modules that may import triton or somebody's trainer, because nothing imports them before they are asked for."""
    shared = path.parent.name == "_triton" and path.name != "__init__.py"
    return shared or path.name in ("triton_kernels.py", "triton_ops.py") or "integrations" in path.parts


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_import_only_torch(path):
    tree = ast.parse(path.read_text())
    assert "rlhf_trainer" not in {top(module) for module, _ in imports(tree)}
    if imported_on_demand(path):
        return
    lazy = set(map(id, lazy_nodes(tree)))
    for node in ast.walk(tree):
        if id(node) in lazy or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        named = [alias.name for alias in node.names]
        modules = named if isinstance(node, ast.Import) else [node.module or "", *named]
        assert not {"triton", "transformers", "trl", "numpy"} & set(map(top, modules)), f"line {node.lineno}"
        assert not [m for m in modules if re.search(r"triton_kernels|triton_ops|_triton\.|integrations", m)], (
            f"line {node.lineno}"
        )


def all_of(module):
    """`__all__` of a module that cannot be imported wherever these tests run."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__")
    return set(ast.literal_eval(found.value))


@pytest.mark.parametrize("path", TRAINER, ids=name_of)
def test_trainer_sees_only_public_names(path):
    public = {*rlhf_kernels.__all__, "__version__"}
    rooms = {"rlhf_kernels": public} | {room: all_of(room) for room in PUBLIC_INTEGRATIONS}
    tree = ast.parse(path.read_text())
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if top(alias.name) == "rlhf_kernels":
                    assert alias.name == "rlhf_kernels", f"line {node.lineno}: {alias.name} is not public"
                    aliases.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and top(node.module) == "rlhf_kernels":
            assert node.module in rooms, f"line {node.lineno}: {node.module} is not public"
            assert {alias.name for alias in node.names} <= rooms[node.module], f"line {node.lineno}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert node.attr in public, f"line {node.lineno}: rlhf_kernels.{node.attr} is not public"


def test_public_names_exist():
    assert sorted(rlhf_kernels.__all__) == list(rlhf_kernels.__all__)
    assert all(hasattr(rlhf_kernels, name) for name in rlhf_kernels.__all__)


def test_files_stay_short():
    rooms = [*CSRC, *KERNELS, *TRAINER, *(p for room in ("tests", "benchmarks") for p in (ROOT / room).rglob("*.py"))]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in rooms}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120
