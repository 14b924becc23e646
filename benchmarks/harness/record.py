"""The JSON of a run: machine, versions, commit, rows."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import rlhf_kernels as rk
from benchmarks.harness.case import CASE_KEY
from benchmarks.harness.peers import ROOT
from rlhf_trainer.studies.machine import commit, cpu_name, output_of, utc_now, versions
from rlhf_trainer.training.files import write_whole

PARTS = ROOT / "build/on_gpu"  # what each stage of on_gpu.py measured
# Two rows that agree in these are the same row, measured twice.
SAME = (*CASE_KEY, "contender", "trainer", "host", "case")


def machine_of(device: torch.device, build: dict) -> dict:
    if device.type != "cuda":
        machine = {"device": cpu_name(), "threads": torch.get_num_threads()}
        return machine | {"cpu_isa": build["cpu_isa"], "cpu_bf16": build["cpu_bf16"]}
    properties, query = torch.cuda.get_device_properties(device), "driver_version,power.limit,clocks.max.sm"
    answer = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}")
    machine = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "l2_mib": properties.L2_cache_size >> 20,
    }
    machine |= dict(zip(query.split(","), map(str.strip, answer.split(",")), strict=False))
    return machine | {"tf32": torch.backends.cuda.matmul.allow_tf32}


def environment(device: torch.device) -> dict:
    build = rk.build_info()
    ours = {"rlhf_kernels": build["version"], "torch": torch.__version__, "cuda": torch.version.cuda}
    peers = versions("triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
    return {
        "device": machine_of(device, build),
        "versions": ours | peers,
        "measured": utc_now(),
        "commit": commit(ROOT),
        "backends": list(rk.available_backends(device)),
        "workspace_budget_mib": build["workspace_budget_mib"],
    }


class Results:
    """The JSON, on the disk after every change, so that a run that is interrupted leaves what it measured; and a line
    per row on the screen."""

    def __init__(self, path: Path, head: dict, content: dict | None = None) -> None:
        self.path, self.content = path, content or head | {"rates": None, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @classmethod
    def open(cls, path: Path, head: dict) -> Results:
        """Adds to a file of the same machine and versions: suites may be run one by one. A row says its commit."""
        if path.exists():
            content = json.loads(path.read_text())
            if all(content.get(key) == head[key] for key in ("device", "versions")):
                return cls(path, head, content | head)
        return cls(path, head)

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")

    def add(self, row: dict, section: str = "rows") -> None:
        """In the place of a row of the same case and contender, if there is one."""
        rows = self.content.setdefault(section, [])
        rows[:] = [old for old in rows if any(old.get(name) != row.get(name) for name in SAME)]
        rows.append(row | {"commit": self.content["commit"]})
        self.write()


def line_of(row: dict) -> str:
    """A row for the screen."""
    shape = f"{row['n']}x{row['d']}x{row['v']} masked {row['masked']:.0%}" if "n" in row else f"{row['s']}"
    words = [row["op"], row["dtype"], f"{shape:30}", f"{row['contender']:24}"]
    if row["status"] != "measured":
        return " ".join([*words, row["status"]])
    words += [f"{name} {row[f'{name}_ms']['median']:.3f} ms" for name in ("forward", "total") if f"{name}_ms" in row]
    return " ".join([*words, f"error {float(row['max_error']):.1e}" if "max_error" in row else ""])
