"""`python -m benchmarks.on_gpu`: fifteen minutes of a GPU. Tests and measures both backends, stage by stage.

A stage is a process of its own with its own time limit: one that fails, hangs or takes the device with it loses nothing
else. It writes its own JSON (build/on_gpu/<stage>.json) at once; after each stage they are merged into
gpu-<device>.json, and their output into gpu-<device>.log beside it. Red tests stop nothing: they are facts in the JSON.
CONTRIBUTING.md says how to prepare a borrowed machine, results/README.md what the columns mean.

`--dry_run` walks through all stages on the CPU, at tiny shapes and Triton in its interpreter, and prints the budget.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import setup_cuda
from benchmarks.harness.peers import ROOT
from benchmarks.harness.record import PARTS, Results, line_of
from rlhf_trainer.studies.machine import UNKNOWN, output_of
from tests.packaging import gpu_bundle
from tests.support.outcomes import how_it_ended, outcomes_in, run

RESULTS = ROOT / "benchmarks/results"
LOG_LENGTH = 1 << 20  # of a stage's output, its end
PYTHON = (sys.executable, "-m")
PYTEST = ("pytest", "-v", "-rfE", "--tb=short")
CHOSEN = ("cuda_device", "batch_invariance", "linear_logprobs", "linear_logprobs_rows", "linear_kl", "linear_dpo")
OF_NATIVE = ("kept_logits", "frozen_head", "dpo", "bradley_terry", "kl_penalty", "sequence_logprobs", "memory")
OF_TRITON = ("triton/test_triton_device", *CHOSEN)
# The third launch of every kernel of a name (nothing is cold then, or compiled), in the state that the step left.
NCU = ("ncu", "--clock-control", "none", "--cache-control", "none", "--set", "detailed", "--csv", "--page", "details")
NCU += ("--section", "SchedulerStats", "--section", "WarpStateStats", "--section", "InstructionStats", "--kernel-id")


class Stage(NamedTuple):
    name: str
    seconds: int
    command: list[str]


def work(name: str, seconds: int) -> Stage:
    return Stage(name, seconds, [*PYTHON, "benchmarks.gpu_work", name, str(0.75 * seconds)])


def pytest(name: str, seconds: int, files: tuple[str, ...], *options: str) -> Stage:
    paths = [f"tests/kernels/{file if '/' in file else f'test_{file}'}.py" for file in files]
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return Stage(name, seconds, [*PYTHON, *PYTEST, *paths, *workers, *options])


def ncu(backend: str, seconds: int, kernels: str, launches: int) -> Stage:
    options = [*NCU, f"::regex:{kernels}:3", "--launch-count", str(launches)]
    return Stage(f"ncu_{backend}", seconds, [*options, *work(f"steps_{backend}", seconds).command])


def tiny(stage: Stage) -> list[str]:
    """What a dry run runs instead; empty where that takes a GPU."""
    if stage.name.endswith("_tests"):
        return [*PYTHON, *PYTEST, "tests/kernels/test_kl_penalty.py", "-k", "k3 and not reference"]
    return [] if stage.command[0] == "ncu" or "pytest" in stage.command else [*stage.command, "--tiny"]


STAGES = {
    "first": [
        work("rates", 20),
        Stage("smoke_native", 12, [*PYTHON, "tests.support.every_op", "native"]),
        Stage("smoke_triton", 26, [*PYTHON, "tests.support.every_op", "triton"]),
        pytest("native_tests", 72, (*CHOSEN, *OF_NATIVE, "dispatch"), "-k", "not triton and not reference"),
        work("native", 40),
        work("triton", 48),
        work("peers", 45),
        work("more_peers", 45),
        work("kernels", 12),
        ncu("native", 22, "fold|differentiate|gemm|nvjet|cutlass", 5),
        ncu("triton", 20, "fold|differentiate", 3),
        pytest("triton_tests", 66, OF_TRITON, "-k", "triton", "-p", "tests.support.untuned"),
    ],
    "second": [
        work("masked", 30),
        work("kl", 45),
        work("dpo", 40),
        pytest("memcheck", 60, ("cuda_device",), "-n0", "-m", "slow", "-k", "sanitizer and memcheck"),
        pytest("racecheck", 60, ("cuda_device",), "-n0", "-m", "slow", "-k", "sanitizer and racecheck"),
        work("grpo", 35),
        work("shapes", 60),
        work("fp32", 25),
    ],
}
KNOWN = STAGES | {stage.name: [stage] for stages in STAGES.values() for stage in stages}


def environment_of(stage: Stage, dry: bool) -> dict[str, str]:
    home = setup_cuda.toolkit() or setup_cuda.USUAL
    paths = [gpu_bundle.SITE, ROOT, ROOT / "python", *filter(None, [os.environ.get("PYTHONPATH")])]
    tools = [os.environ["PATH"], home / "bin", home / "compute-sanitizer"]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PATH": os.pathsep.join(map(str, tools))}
    environment |= {"RLHF_KERNELS_REQUIRE_NATIVE": "1", "RLHF_KERNELS_TEST_DEVICE": "cpu" if dry else "cuda"}
    if dry or "pytest" in stage.command:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if dry:
        environment["TRITON_INTERPRET"] = "1" if "triton" in stage.name else "0"
    return os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | environment


class Run:
    """The merged files of one run."""

    def __init__(self, folder: Path, name: str, seconds: float, dry: bool = False) -> None:
        self.dry, self.started, self.seconds = dry, time.time(), seconds
        file, *others = (place / f"gpu-{name}.json" for place in (folder, RESULTS))
        earlier = [json.loads(path.read_text()) for path in (file, *others) if path.exists() and not dry]
        self.results, self.log = Results(file, {"stages": {}}, *earlier[:1]), file.with_suffix(".log")
        self.log.write_text("")
        PARTS.mkdir(parents=True, exist_ok=True)

    def gone_s(self) -> float:
        return round(time.time() - self.started, 1)

    def add(self, name: str, outcome: dict, part: dict | None = None) -> None:
        """Merges what a stage left, and writes the file."""
        content, part = self.results.content, part or {}
        rows = part.pop("rows", [])
        content |= {key: value for key, value in part.items() if value is not None}
        if content.get("commit") == UNKNOWN:  # the files came without their history
            content["commit"] = gpu_bundle.manifest().get("commit", UNKNOWN)
        content["stages"][name] = outcome
        for row in rows:
            print(f"    {line_of(row)}")
            self.results.add(row | {"stage": name})
        self.results.write()
        counts = ", ".join(f"{outcome[word]} {word}" for word in ("passed", "skipped", "failed") if word in outcome)
        print(f"{name}, {outcome.get('seconds', 0)} s: {outcome['status']} {counts}", flush=True)

    def stage(self, stage: Stage) -> None:
        part, log = PARTS / f"{stage.name}.json", PARTS / f"{stage.name}.log"
        part.unlink(missing_ok=True)
        command, environment = tiny(stage) if self.dry else stage.command, environment_of(stage, self.dry)
        outcome, started = {"budget_s": stage.seconds}, self.gone_s()
        seconds = min(1800 if self.dry else stage.seconds, self.seconds - started)
        why_not = "no time is left" if seconds < stage.seconds / 2 else "" if command else "it takes a GPU"
        if not shutil.which(stage.command[0], path=environment["PATH"]):
            why_not = f"{stage.command[0]} is not installed"
        if why_not:
            return self.add(stage.name, outcome | {"status": f"not run, {why_not}: {' '.join(stage.command)}"})
        outcome["status"] = run(command, seconds, log, environment)
        outcome["seconds"] = round(self.gone_s() - started, 1)
        text = log.read_text(errors="replace")
        with self.log.open("a") as merged:
            merged.write(f"=== {stage.name}: {outcome['status']}\n{text[-LOG_LENGTH:]}\n")
        outcome |= {"last_line": text.strip().rpartition("\n")[2][:600]} if outcome["status"] != "done" else {}
        outcome |= outcomes_in(text) if "pytest" in stage.command else {}
        return self.add(stage.name, outcome, json.loads(part.read_text()) if part.exists() else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of JSON and log (default: benchmarks/results)")
    parser.add_argument("--stages", nargs="+", choices=KNOWN, help="default: first")
    parser.add_argument("--seconds", type=float, default=570, help="for everything, with compiling")
    parser.add_argument("--dry_run", action="store_true", help="all stages, at tiny shapes on the CPU")
    options = parser.parse_args()
    gpu = output_of("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader").partition("\n")[0]
    if gpu == UNKNOWN and not options.dry_run:
        parser.error("nvidia-smi names no GPU here; --dry_run tries the stages without one")
    (name, _, capability), folder = gpu.partition(", "), RESULTS
    if options.dry_run:
        name, folder, options.seconds = "dry-run", PARTS, float("inf")
        for group, stages in STAGES.items():
            print(f"{group} call: {sum(stage.seconds for stage in stages)} s")
            print(*(f"  {stage.seconds:4} s  {stage.name}" for stage in stages), sep="\n")
    name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    this = Run((options.out or folder).absolute(), name, options.seconds, options.dry_run)
    build = gpu_bundle.put_in_place(capability, compile_it=not options.dry_run)
    names = options.stages or (list(STAGES) if options.dry_run else ["first"])
    for stage in (stage for name in names for stage in KNOWN[name]):
        if build and stage.name != "rates":  # which takes no extension
            status, text = how_it_ended(build.wait()), (PARTS / "build.log").read_text(errors="replace")
            this.add("build", {"status": status, "seconds": this.gone_s(), "last_line": text[-600:]})
            build = None
        this.stage(stage)
    print(f"written to {this.results.path} and {this.log.name}, {this.gone_s():.0f} s")
    statuses = [stage["status"] for stage in this.results.content["stages"].values()]
    sys.exit(not all(re.match("done|not run", status) for status in statuses))


if __name__ == "__main__":
    main()
