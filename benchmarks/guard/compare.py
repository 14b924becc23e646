"""Builds two commits, lets their processes take turns, and prints a table of ratios and verdicts (verdict.py)."""

import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.guard.instructions import instruction_ratios
from benchmarks.guard.side import Cannot, Side, sides
from benchmarks.guard.verdict import LEAST_ROUNDS, TO_BE_SEEN, Round, is_bad, judge, with_instructions
from benchmarks.harness.peers import ROOT

BUILDS = ROOT / "build" / "guard"
LINE = "{:40} {:>8} {:>8} {:>13} {:>17} {:>6} {:>7}  {}".format
HEADINGS = ("case", "base ms", "ratio", "99%", "sets", "rounds", "instr.", "")


class Broken(Exception):
    """Why the comparison could not be made."""


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"git {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def build(revision: str) -> Path:
    """The folder of a commit, compiled in place."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}").strip()
    folder = BUILDS / commit
    if not folder.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        part, archive = folder.with_suffix(".part"), str(folder.with_suffix(".tar"))  # at no time half a folder
        git("archive", f"--output={archive}", commit, ".", ":(exclude)benchmarks")
        shutil.rmtree(part, ignore_errors=True)
        shutil.unpack_archive(archive, part, filter="data")
        part.rename(folder)
    print(f"compiling {revision}, {commit[:9]}, in {folder.relative_to(ROOT)}", flush=True)
    environment = os.environ | {"RLHF_KERNELS_NATIVE": "1", "RLHF_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]  # only what is not compiled yet
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"{revision} did not compile:\n{(done.stdout + done.stderr)[-2000:]}")
    return folder


def time_case(pair: list[Side], case: str, seconds: float, least_rounds: int) -> list[Round] | str:
    """Rounds of seconds, one of each side, in random order; or why a side cannot."""

    def request(k: int, command: str) -> dict:
        try:
            return pair[k].request(command, case)
        except Cannot as error:
            raise Cannot(f"{('base', 'head')[k]} cannot: {error}") from error

    rounds, start = [], time.perf_counter()
    try:
        for k in range(2):
            request(k, "make")
        while len(rounds) < least_rounds or time.perf_counter() - start < seconds:
            turns = {k: request(k, "time")["seconds"] for k in random.sample(range(2), 2)}
            rounds.append((turns[0], turns[1]))
    except Cannot as error:
        return str(error)
    return rounds


def time_cases(folders: list[Path], options: Namespace) -> tuple[dict[str, list[list[Round]]], dict[str, str], dict]:
    """By case, its sets of rounds; by case, why there are none; and what base says of itself."""
    sets: dict[str, list[list[Round]]] = {}
    failures: dict[str, str] = {}
    for k in range(options.sets):
        print(f"timing, set {k + 1} of {options.sets}", file=sys.stderr)
        with sides(folders, threads=options.threads, tiny=options.tiny) as pair:
            facts, head = pair[0].facts, pair[1].facts
            if facts["native"] != head["native"]:
                which = "base" if head["native"] else "head"
                raise Broken(f"{which} runs without its compiled part, the other does not; make install compiles it")
            cases = [case for case in facts["cases"] if re.search(options.cases, case)]
            for case in cases:
                if case in failures:
                    continue
                each = options.seconds / options.sets / len(cases)
                rounds = time_case(pair, case, each, math.ceil(LEAST_ROUNDS / options.sets))
                if isinstance(rounds, str):
                    failures[case] = rounds
                else:
                    sets.setdefault(case, []).append(rounds)
    if not sets and not failures:
        raise Broken(f"no case is called {options.cases!r}")
    return {case: rounds for case, rounds in sets.items() if case not in failures}, failures, facts


def line_of(case: str, sets: list[list[Round]], instructions: float | None) -> tuple[str, str]:
    """A line of the table, and its verdict."""
    (low, median, high), verdict = judge(sets)
    verdict = with_instructions(verdict, instructions)
    base_ms = 1e3 * statistics.median(base for rounds in sets for base, _ in rounds)
    medians = [statistics.median(head / base for base, head in rounds) for rounds in sets]
    line = LINE(
        case, f"{base_ms:.1f}", f"{median:.3f}", f"{low:.3f}-{high:.3f}",
        " ".join(f"{of_set:.3f}" for of_set in medians), sum(map(len, sets)),
        "" if instructions is None else f"{instructions:.4f}", verdict,
    )  # fmt: skip
    return line, verdict


def compare(options: Namespace) -> int:
    """Prints the table; 1 if a case is worse, else 0."""
    base = options.base_folder or build(options.base)
    head = options.head_folder or (build(options.head) if options.head else ROOT)
    started = time.perf_counter()
    sets, failures, facts = time_cases([base, head], options)
    instructions, counted_by = {}, "not requested"
    if sets and not options.no_instructions:
        print("counting instructions; under valgrind this takes minutes", file=sys.stderr)
        instructions, counted_by = instruction_ratios([base, head], list(sets))
    kernels = f"compiled for {facts['isa']}" if facts["native"] else "reference backend"
    names = ["the working tree" if folder == ROOT else folder.name[:9] for folder in (base, head)]
    print(f"base {names[0]}, head {names[1]}: {kernels}, torch {facts['torch']}, threads {facts['threads']}")
    print(LINE(*HEADINGS))
    verdicts = dict(failures)
    for case, why in failures.items():
        print(LINE(case, *[""] * 6, why))
    for case, rounds in sets.items():
        line, verdicts[case] = line_of(case, rounds, instructions.get(case))
        print(line)
    print(f"instructions: {counted_by}")
    print(f"{time.perf_counter() - started:.0f} s; processes waiting for a core (load): {os.getloadavg()[0]:.1f}")
    if unsure := list(verdicts.values()).count("cannot tell"):
        hint = "try more --seconds, or a quieter hour"
        print(f"too noisy to see {TO_BE_SEEN:.0%} in {unsure} of {len(verdicts)}: {hint}")
    worse = [case for case, verdict in verdicts.items() if is_bad(verdict)]
    print(f"worse: {'; '.join(worse)}" if worse else "nothing is seen to be slower")
    return int(bool(worse))
