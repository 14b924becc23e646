"""`python -m benchmarks.guard.guard --base REV [--head REV]`: is head slower than base, on this machine, now?

Each side is built in a folder of its own (build/guard/<commit>; a folder that is built is used again) and runs in a
process of its own. Three processes take turns in random order: base, base again, head. A turn is one run of one case.

- Ratio: head / base of the same round; the median of all rounds counts. What disturbs the machine for longer than a
  round falls on both and cancels.
- Interval: where the median of such ratios lies, with 99% confidence, by counting alone: so many of n ratios lie below
  their true median as heads fall in n throws of a coin. Nothing is assumed about how times are distributed.
- A/A: the same of base again / base, whose true ratio is 1. What differs there is this machine's noise: how processes
  happen to lie in memory, or who else is running. Processes are started anew for every set of rounds, so that this
  luck is drawn several times.
- Bound: the farthest that A/A strays from 1, by an end of its interval or the median of one set; at least 1%.
- SLOWER: even the lower end of head's interval is above 1 + bound, and no set of processes says otherwise. faster: the
  upper end is below 1 - bound. "cannot tell": bound and interval are so wide that a slowdown of 5% could hide in them.
  ok: it could not.
- Instructions: head / base of one run at tiny shapes with one thread, by the processor's counter or, where there is
  none, by valgrind (whose processor has other features, so that torch's GEMMs may take other code). They hardly vary,
  so 2% more is a finding ("more instructions"). It decides only where the times cannot tell.

Exit status: 1 if a case is slower, or no longer runs; 2 if the comparison could not be made; else 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
BUILDS = ROOT / "build" / "guard"
WORKER = Path(__file__).with_name("guard_worker.py")
CONFIDENCE = 0.99
LEAST_BOUND = 0.01  # what is smaller is not worth a red cross
TO_BE_SEEN = 0.05  # a slowdown that could not be seen makes the answer "cannot tell"
MORE_INSTRUCTIONS = 1.02
LEAST_ROUNDS = 8  # of a case over all sets: fewer bear no interval of 99%


class Broken(Exception):
    """Why the comparison could not be made."""


class Cannot(Exception):
    """Why a side cannot do a case."""


# --- statistics ---


class Interval(NamedTuple):
    low: float
    median: float
    high: float


class Judged(NamedTuple):
    ratio: Interval
    noise: Interval  # A/A
    bound: float
    verdict: str


def median_interval(ratios: list[float], confidence: float = CONFIDENCE) -> Interval:
    """The ratios' median, and the order statistics between which the true one lies with at least this confidence."""
    ordered, n = sorted(ratios), len(ratios)
    outside, below = (1 - confidence) / 2, 0  # `below`: ratios that may be left out at either end
    subsets = 1  # of at most `below` of n; whole numbers, as 2**n leaves the floats at n = 1024
    while subsets / 2**n <= outside:
        below += 1
        subsets += math.comb(n, below)
    low, high = (ordered[below - 1], ordered[n - below]) if below else (0.0, math.inf)
    return Interval(low, statistics.median(ordered), high)


def judge(sets: list[list[tuple[float, float, float]]]) -> Judged:
    """Of sets of rounds of (base, base again, head) seconds, each set measured by other processes."""
    heads = [[head / base for base, _, head in rounds] for rounds in sets]
    again = [[other / base for base, other, _ in rounds] for rounds in sets]
    ratio, noise = (median_interval([r for ratios in of for r in ratios]) for of in (heads, again))
    strays = [noise.low, noise.high, *map(statistics.median, again)]
    bound = max(LEAST_BOUND, *(abs(stray - 1) for stray in strays))
    if ratio.low > 1 + bound and min(map(statistics.median, heads)) > 1:
        verdict = "SLOWER"
    elif ratio.high < 1 - bound:
        verdict = "faster"
    elif bound + ratio.median - ratio.low > TO_BE_SEEN:
        verdict = "cannot tell"
    else:
        verdict = "ok"
    return Judged(ratio, noise, bound, verdict)


def verdict_with(times: str, instructions: float | None) -> str:
    if instructions is None or instructions <= MORE_INSTRUCTIONS:
        return times
    return "MORE INSTRUCTIONS" if times == "cannot tell" else f"{times}, more instructions"


# --- folders and processes ---


def git(*command: str) -> bytes:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise Broken(f"git {' '.join(command)}: {done.stderr.decode().strip()}")
    return done.stdout


def is_built(folder: Path) -> bool:
    report = folder / "rlhf_kernels" / "_build_report.json"
    said = json.loads(report.read_text()) if report.exists() else {"native": False}
    here = importlib.metadata.version("torch"), sys.implementation.cache_tag
    return said["native"] and (said["torch"], said["python"]) == here


def built(revision: str) -> Path:
    """The folder of a commit, compiled in place."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    folder = BUILDS / commit
    if not folder.exists():
        part = folder.with_suffix(".part")  # at no time half a folder
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(part, filter="data")
        part.rename(folder)
    if not is_built(folder):
        print(f"compiling {revision}, {commit[:9]}, in {folder.relative_to(ROOT)}", flush=True)
        wanted = os.environ | {"RLHF_KERNELS_NATIVE": "1", "RLHF_KERNELS_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=wanted, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Broken(f"{revision} did not compile:\n{(done.stdout + done.stderr)[-2000:]}")
    return folder


class Side:
    """A worker process, which imports rlhf_kernels from `folder`."""

    def __init__(self, folder: Path, threads: int, tiny: bool, wrapper: tuple[str, ...] = ()) -> None:
        own = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}
        command = [*wrapper, sys.executable, "-P", str(WORKER), *(["--tiny"] if tiny else [])]
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.folder = folder

    def hello(self) -> dict:
        told = self.answer()
        if Path(told["file"]).resolve().parents[1] != self.folder.resolve():
            raise Broken(f"{self.folder} was to be measured, and {told['file']} was imported")
        return told

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Broken(f"the process that measures {self.folder} ended, status {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str, case: str) -> dict:
        self.process.stdin.write(json.dumps([command, case]) + "\n")
        self.process.stdin.flush()
        if "cannot" in (told := self.answer()):
            raise Cannot(told["cannot"])
        return told


@contextmanager
def sides(folders: list[Path], **how) -> Iterator[tuple[list[Side], list[dict]]]:
    """Workers that start side by side, and what each says of itself; they end here."""
    with ExitStack() as stack:
        workers = []
        for folder in folders:
            workers.append(side := Side(folder, **how))
            stack.callback(side.process.wait)
            stack.callback(side.process.kill)
        yield workers, [side.hello() for side in workers]


# --- measuring ---


def time_case(workers: list[Side], case: str, seconds: float, least_rounds: int) -> list[tuple[float, ...]] | str:
    """Rounds of seconds, one of each worker; or why a side cannot."""

    def ask(k: int, command: str) -> dict:
        try:
            return workers[k].ask(command, case)
        except Cannot as error:
            raise Cannot(f"{('base', 'base', 'head')[k]} cannot: {error}") from error

    rounds, start = [], time.perf_counter()
    try:
        for k in range(3):
            ask(k, "make")
        while len(rounds) < least_rounds or time.perf_counter() - start < seconds:
            turns = {k: ask(k, "time")["seconds"] for k in random.sample(range(3), 3)}
            rounds.append(tuple(turns[k] for k in range(3)))
    except Cannot as error:
        return str(error)
    return rounds


class Counting:
    """Instructions of one run at tiny shapes: by the processor's counter, else by valgrind, else why not."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders, self.how, self.why_not = folders, "the processor's counter", ""

    def ratios(self, cases: list[str]) -> dict[str, float]:
        """Head / base, by case."""
        try:
            with sides(self.folders, threads=1, tiny=True) as (workers, _):
                return self.of(workers, cases, lambda side, case: side.ask("count", case)["instructions"])
        except Cannot as error:
            no_counter = str(error)
        self.how = f"valgrind ({no_counter})"
        if missing := [name for name in ("valgrind", "vgdb") if shutil.which(name) is None]:
            self.why_not = f"{no_counter}; {' and '.join(missing)} not found"
            return {}
        with tempfile.TemporaryDirectory() as out:
            wrapper = ("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}/%p")
            try:
                with sides(self.folders, threads=1, tiny=True, wrapper=wrapper) as (workers, _):
                    return self.of(workers, cases, lambda side, case: count_by_callgrind(side, case, Path(out)))
            except (Broken, Cannot, subprocess.SubprocessError) as error:
                self.why_not = f"{no_counter}; valgrind: {error}"
                return {}

    def of(self, workers: list[Side], cases: list[str], count: Callable[[Side, str], int]) -> dict[str, float]:
        def all_of(side: Side) -> list[int]:
            counts = []
            for case in cases:
                side.ask("make", case)
                counts.append(count(side, case))
            return counts

        with ThreadPoolExecutor() as pool:  # both at once: counts, unlike times, do not mind
            base, head = pool.map(all_of, workers)
        return {case: after / before for case, before, after in zip(cases, base, head, strict=True)}


def callgrind_total(text: str) -> int:
    """Instructions between this dump and the one before it."""
    found = re.search(r"^totals: (\d+)", text, re.MULTILINE)
    if found is None:
        raise Broken("callgrind wrote no totals")
    return int(found[1])


def count_by_callgrind(side: Side, case: str, out: Path) -> int:
    """Counts what runs between two dumps. Nothing is counted before the first: importing torch would take minutes."""

    def tell(*command: str) -> None:
        told = ["vgdb", f"--pid={side.process.pid}", *command]
        subprocess.run(told, check=True, capture_output=True, timeout=120)

    tell("instrumentation", "on")
    tell("dump")
    side.ask("time", case)
    tell("dump")
    newest = max(out.glob(f"{side.process.pid}.*"), key=lambda path: int(path.suffix[1:]))
    return callgrind_total(newest.read_text())


# --- the table ---


def measure(folders: list[Path], options: argparse.Namespace) -> tuple[dict[str, list | str], dict]:
    """By case, its sets of rounds or why there are none; and what base says of itself."""
    found: dict[str, list | str] = {}
    for k in range(options.sets):
        print(f"timing, set {k + 1} of {options.sets}", file=sys.stderr)
        with sides([folders[0], *folders], threads=options.threads, tiny=options.tiny) as (workers, told):
            if told[0]["native"] != told[2]["native"]:
                which = "base" if told[2]["native"] else "head"
                raise Broken(f"{which} runs without its compiled part, the other does not; make install compiles it")
            cases = [case for case in told[0]["cases"] if re.search(options.cases, case)]
            for case in cases:
                if isinstance(found.get(case), str):
                    continue
                each = options.seconds / options.sets / len(cases)
                rounds = time_case(workers, case, each, math.ceil(LEAST_ROUNDS / options.sets))
                if isinstance(rounds, str):
                    found[case] = rounds
                else:
                    found.setdefault(case, []).append(rounds)
    return found, told[0]


LINE = "{:40} {:>8} {:>8} {:>13} {:>13} {:>6} {:>6} {:>7}  {}".format


def row(case: str, sets: list, instructions: float | None) -> tuple[str, str]:
    """A line of the table, and its verdict."""
    judged = judge(sets)
    verdict = verdict_with(judged.verdict, instructions)
    base_ms = 1e3 * statistics.median(base for rounds in sets for base, _, _ in rounds)
    line = LINE(
        case, f"{base_ms:.1f}", f"{judged.ratio.median:.3f}",
        f"{judged.ratio.low:.3f}-{judged.ratio.high:.3f}", f"{judged.noise.low:.3f}-{judged.noise.high:.3f}",
        f"{judged.bound:.1%}", sum(map(len, sets)), "" if instructions is None else f"{instructions:.4f}", verdict,
    )  # fmt: skip
    return line, verdict


def compare(options: argparse.Namespace) -> int:
    base = options.base_folder or built(options.base)
    head = options.head_folder or (built(options.head) if options.head else ROOT)
    started = time.perf_counter()
    found, told = measure([base, head], options)
    if not found:
        raise Broken(f"no case is called {options.cases!r}")
    counting = Counting([base, head])
    able = [case for case, sets in found.items() if not isinstance(sets, str)]
    instructions = {}
    if able and not options.no_instructions:
        print("counting instructions; under valgrind this takes minutes", file=sys.stderr)
        instructions = counting.ratios(able)
    with_what = f"compiled for {told['isa']}" if told["native"] else "reference backend"
    names = ["the working tree" if folder == ROOT else folder.name[:9] for folder in (base, head)]
    print(f"base {names[0]}, head {names[1]}: {with_what}, torch {told['torch']}, threads {told['threads']}")
    print(LINE("case", "base ms", "ratio", "99%", "A/A 99%", "bound", "rounds", "instr.", ""))
    verdicts = {}
    for case, sets in found.items():
        line, verdicts[case] = (
            (LINE(case, *[""] * 7, sets), sets) if isinstance(sets, str) else row(case, sets, instructions.get(case))
        )
        print(line)
    print(
        f"instructions: {counting.why_not or counting.how}"
        if not options.no_instructions
        else "instructions: not asked"
    )
    print(f"{time.perf_counter() - started:.0f} s; processes waiting for a core (load): {os.getloadavg()[0]:.1f}")
    bad = [case for case, said in verdicts.items() if said.startswith(("SLOWER", "MORE INSTRUCTIONS", "head cannot"))]
    unsure = [case for case, said in verdicts.items() if said == "cannot tell"]
    if unsure:
        print(
            f"too noisy to see {TO_BE_SEEN:.0%} in {len(unsure)} of {len(found)}: try more --seconds, or a quieter hour"
        )
    print(f"worse: {', '.join(bad)}" if bad else "nothing is seen to be slower")
    return int(bool(bad))


def main() -> int:
    def folder(text: str) -> Path:
        if not (path := Path(text).resolve()).is_dir():
            raise argparse.ArgumentTypeError(f"{text} is no folder")
        return path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base, head = (parser.add_mutually_exclusive_group(required=needed) for needed in (True, False))
    base.add_argument("--base", metavar="REV", help="the commit to compare with")
    base.add_argument("--base-folder", type=folder, help="a folder that holds a built rlhf_kernels, instead")
    head.add_argument("--head", metavar="REV", help="the commit in question (default: the working tree as it is)")
    head.add_argument("--head-folder", type=folder, help="a folder that holds a built rlhf_kernels, instead")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only those whose name contains it")
    parser.add_argument("--seconds", type=float, default=150, help="of timing, all cases together")
    parser.add_argument("--sets", type=int, default=3, help="how often processes are started anew")
    parser.add_argument("--threads", type=int, default=1, help="1: processor time; more: time by the clock")
    parser.add_argument("--no-instructions", action="store_true", help="count none")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this file")
    try:
        return compare(parser.parse_args())
    except Broken as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
