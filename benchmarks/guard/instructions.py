"""Instructions of one run of a case, for each of two folders, counted by valgrind: no virtual machine has a counter of
its own. Valgrind's processor has other features than most, so that torch's GEMMs may take other code."""

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.guard.side import Cannot, Side, sides
from benchmarks.harness.worker import Ended

VALGRIND = ("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no")


def instruction_ratios(folders: list[Path], cases: list[str]) -> tuple[dict[str, float], str]:
    """Head / base by case, at tiny shapes with one thread; and how they were counted, or why they were not."""
    if missing := [name for name in ("valgrind", "vgdb") if shutil.which(name) is None]:
        return {}, f"{' and '.join(missing)} not found"
    with tempfile.TemporaryDirectory() as folder:
        wrapper = (*VALGRIND, f"--callgrind-out-file={folder}/%p")

        def counts_of(side: Side) -> list[int]:
            return [count(side, case, Path(folder)) for case in cases]

        try:
            with sides(folders, threads=1, tiny=True, wrapper=wrapper) as pair, ThreadPoolExecutor() as pool:
                base, head = pool.map(counts_of, pair)  # both at once: counts, unlike times, do not mind
        except (Ended, Cannot, ValueError, subprocess.SubprocessError) as error:
            return {}, f"valgrind: {error}"
    return {case: after / before for case, before, after in zip(cases, base, head, strict=True)}, "valgrind"


def count(side: Side, case: str, folder: Path) -> int:
    """Counts what runs between two dumps. Nothing is counted before the first: importing torch would take minutes."""
    pid = side.worker.process.pid

    def control(*command: str) -> None:
        subprocess.run(["vgdb", f"--pid={pid}", *command], check=True, capture_output=True, timeout=120)

    side.request("make", case)
    control("instrumentation", "on")
    control("dump")
    side.request("time", case)
    control("dump")
    newest = max(folder.glob(f"{pid}.*"), key=lambda path: int(path.suffix[1:]))
    return callgrind_total(newest.read_text())


def callgrind_total(text: str) -> int:
    """Instructions between this dump and the one before it."""
    total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
    if total is None:
        raise ValueError("callgrind wrote no totals")
    return int(total[1])
