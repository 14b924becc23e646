"""The JSON of a run: machine, versions, commit, rows."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

import rlhf_kernels as rk
from benchmarks.harness.jobs import ROWS
from benchmarks.harness.peers import older_trl

ROOT = Path(__file__).resolve().parent.parent.parent
NOTES = {
    "forward_ms, total_ms": "median, min and max of `rounds` turns; forward without autograd, total = forward and "
    "backward with gradients of hidden and weight in fresh memory; backward_ms = total - forward, of medians",
    "gemm_fraction": "flops that the fused op cannot do without / time / the rate of the bare GEMMs of the same shape "
    "and the same turns: products of hidden and weight in forward; a recomputed one, dH and dW besides in total",
    "over_native": "median time / that of the native backend in the same turns: forward, total; below 1 it is faster",
    "targets": "the largest native / contender that is good enough: forward, total",
    "first_s": "the first forward and the first forward and backward, with whatever is compiled or tuned for them",
    "tuner": "what Triton's tuner chose, by kernel",
    "peak_mib": "most memory beyond inputs (and, in total, beyond the gradients of hidden and weight); on CPU the most "
    "a fresh process held",
    "max_error": f"largest |value - fp64's|, nats, over {ROWS} rows; of a loss, or of a mean over those rows, where "
    "there is no value a row",
    "hidden_gradient_error": f"|dH - fp64's| / |fp64's| of {ROWS} rows, Frobenius",
    "batch_invariant": f"the bits of {ROWS} rows alone are those within the whole batch",
}
# Two rows that agree in these are the same row, measured twice.
SAME = ("op", "dtype", "n", "d", "v", "s", "t", "pairs_per_response", "masked", "softcap", "model", "sweep", "threads")
SAME += ("contender", "trainer", "host", "case")


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def cpu_name() -> str:
    """With its family and model where a hypervisor hides its number: those of one name differ twofold in speed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = said.get("model name") or platform.processor() or platform.machine()
    if any(character.isdigit() for character in name) or "cpu family" not in said:
        return name
    return f"{name}, family {said['cpu family']} model {said['model']}"


def environment(device: torch.device) -> dict:
    built = rk.build_info()
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device)
        machine = {
            "device": has.name,
            "capability": f"{has.major}.{has.minor}",
            "multiprocessors": has.multi_processor_count,
            "memory_mib": has.total_memory >> 20,
            "l2_mib": has.L2_cache_size >> 20,
        }
        asked = "driver_version,power.limit,clocks.max.sm"
        told = output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={device.index or 0}")
        machine |= dict(zip(asked.split(","), map(str.strip, told.split(",")), strict=False))
        machine["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        machine = {"device": cpu_name(), "threads": torch.get_num_threads(), "cpu_isa": built["cpu_isa"]}
        machine["cpu_bf16"] = built["cpu_bf16"]
    has_packages = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    asked_for = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
    peers = {name: has_packages.get(name, "not installed") for name in asked_for}
    return {
        "device": machine,
        "versions": {"rlhf_kernels": built["version"], "torch": torch.__version__, "cuda": torch.version.cuda}
        | peers
        | {"trl (older)": older_trl() or "not installed"},
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "backends": list(rk.available_backends(device)),
        "workspace_budget_mib": built["workspace_budget_mib"],
    }


class Results:
    """The JSON, on the disk after every change, so that a run that is interrupted leaves what it measured; and a line
    per row on the screen."""

    def __init__(self, path: Path, head: dict, content: dict | None = None) -> None:
        self.path, self.content = path, content or head | {"notes": NOTES, "rates": None, "rows": []}
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
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        whole.replace(self.path)  # at no time half a file

    def add(self, row: dict, section: str = "rows") -> None:
        """In the place of a row of the same job and contender, if there is one."""
        rows = self.content.setdefault(section, [])
        rows[:] = [old for old in rows if any(old.get(name) != row.get(name) for name in SAME)]
        rows.append(row | {"commit": self.content["commit"]})
        self.write()


def line_of(row: dict) -> str:
    shape = f"{row['n']}x{row['d']}x{row['v']} masked {row['masked']:.0%}" if "n" in row else f"{row['s']}"
    said = row["status"]
    if said == "measured":
        parts = []
        for name in ("forward", "total"):
            if f"{name}_ms" in row:
                fraction = row.get(f"gemm_fraction_{name}")
                part = f"{name} {row[f'{name}_ms']['median']:9.3f} ms"
                parts.append(part if fraction is None else f"{part} ({fraction:.2f})")
        if "max_error" in row:
            parts.append(f"error {float(row['max_error']):.1e}")
        said = "  ".join(parts)
    return f"{row['op']} {row['dtype']} {shape:30} {row['contender']:24} {said}"
