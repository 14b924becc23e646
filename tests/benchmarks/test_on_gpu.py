"""benchmarks/on_gpu.py where there is no GPU: its own control flow, at tiny shapes on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.peers import TRL

ROOT = Path(__file__).resolve().parents[2]
OPS = {"linear_logprobs", "linear_kl", "linear_dpo_loss", "grpo"}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(tmp_path, *options, **environment):
    """The command's exit status, its output, and the file that it wrote. One thread: the shapes are too small for
    more, which would wait for each other."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--device", "cpu", "--tiny", "--out", out, *options]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


def of(content, contender):
    return [row for row in content["rows"] if row["contender"] == contender]


def test_every_op_is_measured_and_every_contender_has_a_row(tmp_path):
    """Triton cannot run on a CPU: it has rows that say so, the others are measured, and the command fails."""
    status, output, content = run(tmp_path, "--backends", "native,triton", TRITON_INTERPRET="0")
    rows = content["rows"]
    native, triton = of(content, "native"), of(content, "triton")
    assert {row["op"] for row in native} == {row["op"] for row in triton} == OPS
    assert all(row["status"] == "measured" and row["total_ms"]["median"] > 0 for row in native)
    assert {"eager", TRL, "CCE", "Liger", "verl"} <= {row["contender"] for row in rows}
    assert all(row["status"] for row in rows)
    assert all(row["over_native"]["total"] > 0 for row in of(content, "eager"))
    assert content["commit"] and content["versions"]["torch"]
    assert all("backend='triton' cannot run here" in row["status"] for row in triton)
    assert status == 1 and "linear_kl bfloat16, triton: cannot run here" in output


@needs_triton
def test_triton_is_measured_beside_native(tmp_path):
    """By its interpreter, which runs on the CPU: the numbers mean nothing, the columns are those of a GPU."""
    status, output, content = run(tmp_path, "--no-rivals", TRITON_INTERPRET="1")
    assert status == 0, output
    native, triton = of(content, "native"), of(content, "triton")
    assert {row["contender"] for row in content["rows"]} == {"bare GEMMs", "native", "native, larger budget", "triton"}
    assert [row["op"] for row in triton] == [row["op"] for row in native]
    assert {row["op"] for row in triton} == OPS
    for row in triton:
        assert row["status"] == "measured", row
        assert row["max_error"] < 1e-3 and row.get("hidden_gradient_error", 0) < 4e-3
        assert row.get("batch_invariant", True)
        assert all(row["over_native"][what] > 0 and row[f"gemm_fraction_{what}"] > 0 for what in ("forward", "total"))
        assert row["first_s"] > 0 and len(row["tuner"]) == 2
    assert "triton" in content["backends"]


def test_the_script_is_a_script():
    subprocess.run(["bash", "-n", ROOT / "benchmarks/on_gpu.sh"], check=True)
