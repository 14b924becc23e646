"""The imitation of CUDA that runs the kernels on the host keeps its promises, above all to show what is wrong."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def self_test(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    program = tmp_path_factory.mktemp("cuda_on_host") / "self_test"
    includes = ["-DRK_CUDA_ON_HOST", f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    sources = [*(str(HERE / name) for name in ("self_test.cpp", "gemm_on_host.cpp")), "-o", str(program)]
    done = subprocess.run(
        [compiler, "-std=c++20", *SANITIZED, *warnings, *includes, *sources],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip(f"{compiler} comes without its sanitizers")
    assert done.returncode == 0, done.stderr

    def run(name):
        environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
        return subprocess.run([program, name], env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    "name", ["sum", "shuffles", "barrier", "indices", "launches", "races", "deadlocks", "rounding", "gemm"]
)
def test_holds(self_test, name):
    done = self_test(name)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the sanitizers have nothing to say of fibers


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("write_past_end", ["heap-buffer-overflow"]),
        ("write_past_shared_end", ["global-buffer-overflow", "insufficient space"]),  # whichever sanitizer is first
        ("misaligned", ["requires 16 byte alignment"]),
    ],
)
def test_mistake_is_caught(self_test, name, messages):
    done = self_test(name)
    assert done.returncode != 0
    assert any(words in done.stderr for words in messages), done.stderr
