"""benchmarks/on_gpu.py where there is no GPU: its own control flow, at tiny shapes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_op_is_measured_and_every_contender_has_a_row(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--device", "cpu", "--tiny", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    content = json.loads(out.read_text())
    rows = content["rows"]
    fused = [row for row in rows if row["contender"] == "fused"]
    assert {row["op"] for row in fused} == {"linear_logprobs", "linear_kl", "linear_dpo_loss"}
    assert all(row["status"] == "measured" and row["total_ms"]["median"] > 0 for row in fused)
    assert {"eager", "TRL", "CCE", "Liger"} <= {row["contender"] for row in rows}
    assert all(row["status"] for row in rows)
    assert content["commit"] and content["versions"]["torch"]


def test_the_script_is_a_script():
    subprocess.run(["bash", "-n", ROOT / "benchmarks/on_gpu.sh"], check=True)
