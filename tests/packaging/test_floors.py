"""The floors of the house: csrc < rlhf_kernels < rlhf_trainer, and the rooms of each. None may know of one above it."""

import ast
import re
from pathlib import Path

import pytest

import rlhf_kernels
from rlhf_trainer.commands import COMMANDS
from tests.support.imports import circles, modules_below

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "rlhf_kernels").rglob("*.py"))
TRAINER = sorted((ROOT / "python" / "rlhf_trainer").rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
PUBLIC_ROOMS = (
    "rlhf_kernels.integrations.lm_head", "rlhf_kernels.integrations.transformers", "rlhf_kernels.parallel",
)  # fmt: skip
MAX_LINES = 450
# Lines of Python: features come by libraries. Studies are programs that use the trainer, and count by themselves.
STUDIES = "python/rlhf_trainer/studies"
LEAN = {"rlhf_kernels": 10_000, "python": 13_000, STUDIES: 1_800, "benchmarks": 3_900}

# The trainer's rooms from the ground up; those of one row do not know each other.
ROOMS = (
    {"errors", "commands"},
    {"config"},
    {"data"},
    {"training"},
    {"models"},
    {"offline", "rollouts", "rewards"},
    {"preferences"},
    {"online"},
    {"evaluation"},
    {"recipes"},
    {"studies", "inspection"},
    {"planning"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
COMPOSERS = ("recipes", "studies", "cli")  # rooms that may import commands: they are made of them
TREE = modules_below(ROOT / "python" / "rlhf_trainer")
BENCHMARK_FLOOR = {"harness": 0, "report": 1, "steps": 1, "guard": 1, "scaling": 2}  # what is not here is an entry


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
    return (
        shared
        or path.name in ("triton_kernels.py", "triton_frozen.py", "triton_ops.py")
        or "integrations" in path.parts
    )


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
        assert not [
            m for m in modules if re.search(r"triton_kernels|triton_frozen|triton_ops|_triton\.|integrations", m)
        ], f"line {node.lineno}"


def all_of(module):
    """`__all__` of a module that cannot be imported wherever these tests run."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__")
    return set(ast.literal_eval(found.value))


@pytest.mark.parametrize("path", TRAINER, ids=name_of)
def test_trainer_sees_only_public_names(path):
    public = {*rlhf_kernels.__all__, "__version__"}
    rooms = {"rlhf_kernels": public} | {room: all_of(room) for room in PUBLIC_ROOMS}
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


def room_of(module):
    return module.split(".")[1]


def test_arrows_between_rooms_run_down():
    """Also those of imports inside functions."""
    inside = {module: others for module, others in TREE.items() if "." in module}
    assert {room_of(module) for module in inside} <= FLOOR.keys(), "a new room has a floor in ROOMS"
    arrows = [(module, other) for module, others in inside.items() for other in others if "." in other]
    between = [(module, other) for module, other in arrows if room_of(module) != room_of(other)]
    assert [arrow for arrow in between if FLOOR[room_of(arrow[0])] <= FLOOR[room_of(arrow[1])]] == []


def test_no_library_code_imports_a_command():
    commands = {f"rlhf_trainer.{command.function.partition(':')[0]}" for command in COMMANDS.values()}
    assert commands <= TREE.keys()
    library = [module for module in TREE if "." in module and room_of(module) not in COMPOSERS]
    assert [(module, other) for module in library for other in TREE[module] & commands] == []


def test_the_command_table_imports_nothing():
    """So that anything may import it; what its texts name is there."""
    assert TREE["rlhf_trainer.commands"] == set()
    for command in COMMANDS.values():
        assert isinstance(command.load_config(), type) and callable(command.load_function())


def test_arrows_between_rooms_of_the_benchmarks_run_down():
    arrows = [(a, b) for a, others in modules_below(ROOT / "benchmarks").items() for b in others]
    between = [(a, b) for a, b in arrows if room_of(a) != room_of(b)]
    floors = [(BENCHMARK_FLOOR.get(room_of(a), 3), BENCHMARK_FLOOR.get(room_of(b), 3)) for a, b in between]
    wrong = [arrow for arrow, (a, b) in zip(between, floors, strict=True) if b > a or a == b < 3]
    assert wrong == []


@pytest.mark.parametrize("package", ["rlhf_kernels", "python/rlhf_trainer", "benchmarks"])
def test_no_circles(package):
    assert circles(modules_below(ROOT / package)) == []


def test_rooms_of_csrc():
    """CUDA code includes no kernel of the CPU; and isa/, which compiles every op once more, stands above them all."""
    for path in CSRC:
        text = path.read_text()
        if "cuda" in path.parts or "_cuda" in path.name:
            assert not re.findall(r"#include \"common/(?:cpu|simd)/.*", text), path
        if "isa" not in path.parts:
            assert not re.findall(r"#include \"isa/.*", text), path


def test_public_names_exist():
    assert sorted(rlhf_kernels.__all__) == list(rlhf_kernels.__all__)
    assert all(hasattr(rlhf_kernels, name) for name in rlhf_kernels.__all__)


def test_files_stay_short():
    rooms = [*CSRC, *KERNELS, *TRAINER, *(p for room in ("tests", "benchmarks") for p in (ROOT / room).rglob("*.py"))]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in rooms}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120


@pytest.mark.parametrize("folder", LEAN)
def test_lean_is_a_promise(folder):
    paths = [
        path for path in (ROOT / folder).rglob("*.py") if folder == STUDIES or (ROOT / STUDIES) not in path.parents
    ]
    assert sum(len(path.read_text().splitlines()) for path in paths) < LEAN[folder]
