"""The machine and the code behind a result: processor, versions, commit and time, as text."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import rlhf_kernels as rk

UNKNOWN, NOT_INSTALLED = "unknown", "not installed"


def environment() -> dict[str, Any]:
    """The facts that stand at the head of a result."""
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {"rlhf_kernels": rk.__version__, **versions("torch", "transformers"), "python": python_version()},
        "commit": commit(),
        "measured": utc_now(),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; with family and model where a hypervisor hides its number, as processors of one name differ
    twofold in speed."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = first.get("model name") or platform.processor() or platform.machine()
    if any(character.isdigit() for character in name) or "cpu family" not in first:
        return name
    return f"{name}, family {first['cpu family']} model {first['model']}"


def python_version() -> str:
    return platform.python_version()


def versions(*packages: str) -> dict[str, str]:
    """Each package's installed version, by the name that pip knows; NOT_INSTALLED for one that is missing."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {package: installed.get(package, NOT_INSTALLED) for package in packages}


def commit(folder: Path = Path(__file__).parent) -> str:
    """The git commit of the checkout that holds `folder`, with "-dirty" behind it where files have changed."""
    return output_of("git", "describe", "--always", "--dirty", folder=folder)


def output_of(*command: str, folder: Path | None = None) -> str:
    """The output of a short command, run in `folder`; UNKNOWN where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip()


def utc_now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
