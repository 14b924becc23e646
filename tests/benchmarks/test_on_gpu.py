"""benchmarks/on_gpu.py where there is no GPU: its stages at tiny shapes on the CPU, and stages that go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_work, on_gpu
from benchmarks.harness.peers import TRL
from benchmarks.on_gpu import KNOWN, STAGES, Run, Stage
from tests.support.outcomes import outcomes_in, run

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["rates", "smoke_native", "smoke_triton", "native_tests", "native", "triton", "peers", "more_peers", "kernels"]
FIRST += ["ncu_native", "ncu_triton", "triton_tests"]
QUICK = ["rates", "smoke_native", "native_tests", "native", "ncu_native", "memcheck"]


def dry_run(folder, *options):
    """The command's output and the JSON that it wrote."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--dry_run", "--out", folder, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "gpu-dry-run.json").read_text())


def check(output, content):
    """What every dry run shows."""
    stages = content["stages"]
    assert "first call: 428 s" in output and "  20 s  rates" in output
    assert stages["rates"]["status"] == "done" and content["rates"]["gemm"]["tflops"] > 0
    assert all(tile["tflops"] > 0 for tile in content["rates"]["tiles"])
    assert stages["native_tests"]["passed"] > 9 and stages["native_tests"]["failures"] == {}
    assert stages["ncu_native"]["status"].startswith("not run, ") and "--clock-control none" in output
    assert stages["memcheck"]["status"].startswith("not run, it takes a GPU")
    assert {row["contender"] for row in content["rows"]} >= {"bare GEMMs", "native", "native, larger budget"}
    assert content["commit"] and content["versions"]["torch"] and all(row["stage"] for row in content["rows"])
    for row in content["rows"]:
        if row["contender"] == "native":
            assert row["status"] == "measured" and row["max_error"] < 1e-3 and row["total_ms"]["median"] > 0


def test_a_dry_run_of_some_stages(tmp_path):
    check(*dry_run(tmp_path, "--stages", *QUICK))
    assert "=== smoke_native: done\nevery op ran by native" in (tmp_path / "gpu-dry-run.log").read_text()


@pytest.mark.slow
def test_a_dry_run_of_all_stages(tmp_path):
    """Triton's by its interpreter, which runs on the CPU: the columns are those of a GPU."""
    pytest.importorskip("triton")
    output, content = dry_run(tmp_path)
    check(output, content)
    assert list(content["stages"]) == [stage.name for stages in STAGES.values() for stage in stages]
    rows, names = content["rows"], {row["contender"] for row in content["rows"]}
    assert {row["op"] for row in rows} == {"linear_logprobs", "linear_kl", "linear_dpo_loss", "grpo"}
    assert names >= {"triton", "eager", TRL, "CCE", "Liger", "Liger, sum", "Liger, scaled", "torch chunked"}
    (triton,) = [row for row in rows if row["contender"] == "triton"]
    assert triton["max_error"] < 1e-3 and triton["over_native"]["total"] > 0 and triton["batch_invariant"]
    assert content["stages"]["triton_tests"]["passed"] > 9 and content["kernels"]["native"]


def test_order_and_budgets():
    """The first call ends in time on a machine that is lent for ten minutes a command."""
    assert [stage.name for stage in STAGES["first"]] == FIRST
    assert sum(stage.seconds for stage in STAGES["first"]) < 430
    assert sum(stage.seconds for stage in STAGES["second"]) < 430


def test_every_stage_names_what_is_there():
    works = {*gpu_work.CASES, "rates", "kernels", "steps_native", "steps_triton"}
    for stage in (stage for stages in STAGES.values() for stage in stages):
        for word in stage.command:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word
        if "benchmarks.gpu_work" in stage.command:
            assert stage.command[stage.command.index("benchmarks.gpu_work") + 1] in works
    assert set(gpu_work.CASES) <= KNOWN.keys()


ROW = {"op": "linear_logprobs", "dtype": "bfloat16", "n": 1, "d": 2, "v": 3, "masked": 0.0, "status": "measured"}


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """new_run(seconds): a run whose files lie in tmp_path."""
    monkeypatch.setattr(on_gpu, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path / "results")
    return lambda seconds=1e6: Run(tmp_path, "planted", seconds)


def planted(name, code, seconds=600, ms=1.0, contender="native", **part):
    """A stage that leaves a row, and then does what `code` says."""
    row = ROW | {"contender": contender, "total_ms": {"median": ms}}
    part = json.dumps(part | {"commit": "abc", "rows": [row]})
    script = f"import os, sys, time; open({str(on_gpu.PARTS / name)!r} + '.json', 'w').write({part!r}); {code}"
    return Stage(name, seconds, [sys.executable, "-c", script])


def test_a_stage_that_goes_wrong_loses_nothing_else(new_run):
    this = new_run()
    for stage in (
        planted("good", "pass", contender="TRL", device={"device": "Some GPU"}),
        planted("crash", "os.abort()"),
        planted("failure", "sys.exit('a reason')", ms=2.0),
        Stage("missing", 600, ["no-such-program", "--option"]),
        planted("hang", "time.sleep(1000)", seconds=1),
        Stage("deaf", 1, ["sh", "-c", "trap '' INT; sleep 1000"]),
        planted("last", "print('the end')", contender="eager"),
    ):
        this.stage(stage)
        content = json.loads(this.results.path.read_text())  # after every stage
        assert stage.name in content["stages"]
    stages = content["stages"]
    assert [stages[name]["status"] for name in ("good", "crash", "failure")] == [
        "done", "killed by SIGABRT", "exit status 1",
    ]  # fmt: skip
    assert stages["failure"]["last_line"] == "a reason"
    assert stages["missing"]["status"] == "not run, no-such-program is not installed: no-such-program --option"
    assert stages["hang"]["status"] == stages["deaf"]["status"] == "stopped after 0.9 s"
    assert stages["last"]["status"] == "done" and "the end" in this.log.read_text()
    assert content["device"] == {"device": "Some GPU"}
    rows = {row["contender"]: row for row in content["rows"]}
    assert rows.keys() == {"TRL", "native", "eager"} and rows["TRL"]["stage"] == "good"


def test_a_later_call_goes_on_with_the_file(new_run, tmp_path):
    """From the folder, or from the results that travelled with the checkout; a row that is measured again is new."""
    new_run().stage(planted("first", "pass", contender="TRL"))
    (tmp_path / "results").mkdir()
    (tmp_path / "gpu-planted.json").rename(tmp_path / "results/gpu-planted.json")
    for ms in (1.0, 2.0):
        new_run().stage(planted("second", "pass", ms=ms))
    content = json.loads((tmp_path / "gpu-planted.json").read_text())
    assert content["stages"].keys() == {"first", "second"}
    assert [(row["contender"], row["total_ms"]["median"]) for row in content["rows"]] == [("TRL", 1.0), ("native", 2.0)]


def test_no_stage_starts_without_time(new_run):
    this = new_run(seconds=10)
    this.stage(planted("late", "pass", seconds=600))
    assert this.results.content["stages"]["late"]["status"].startswith("not run, no time is left")


def test_what_a_process_started_ends_with_it(tmp_path):
    """Its child, which holds the pipe open, is killed before it writes."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 3>{tmp_path}/pipe; (sleep 60; echo alive >&3) &"
    assert run(["sh", "-c", script], 600, tmp_path / "log", dict(os.environ)) == "done"
    os.set_blocking(pipe, True)
    assert os.read(pipe, 8) == b""
    os.close(pipe)


def test_outcomes_of_tests():
    """By xdist and without it; of a run that was killed there is no summary."""
    lines = [
        "[gw0] [  1%] PASSED tests/a.py::test_one[x y] ",
        "tests/a.py::test_two PASSED                                     [ 50%]",
        "[gw1] [  2%] SKIPPED tests/a.py::test_three ",
        "[gw1] [  3%] FAILED tests/a.py::test_four[1 - 2] ",
        "[gw1] [  3%] ERROR tests/a.py::test_five ",
    ]
    killed = outcomes_in("\n".join(lines))
    assert {name: killed[name] for name in ("passed", "skipped", "failed")} == {"passed": 2, "skipped": 1, "failed": 2}
    assert killed["failures"] == {"tests/a.py::test_four[1 - 2]": "", "tests/a.py::test_five": ""}
    summed = outcomes_in("\n".join([*lines, "FAILED tests/a.py::test_four[1 - 2] - AssertionError: 1 - 2 = 3"]))
    assert summed["failures"] == {
        "tests/a.py::test_four[1 - 2]": "AssertionError: 1 - 2 = 3", "tests/a.py::test_five": "",
    }  # fmt: skip


def test_the_script_is_a_script():
    done = subprocess.run(["benchmarks/on_gpu.sh", "--help"], cwd=ROOT, env=os.environ | {"PYTHON": sys.executable},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "--dry_run" in done.stdout
