"""A pytest plugin: rlhf_kernels' compiled part is the one whose CUDA kernels run on the host (build.py says how).

RK_CUDA_ON_HOST_ASAN=1 takes the module with AddressSanitizer, RK_CUDA_ON_HOST_MODULE one that is already built, and
RK_CUDA_ON_HOST_SCHEDULE says the order of threads and blocks. At its end a session tells what it launched.
"""

import collections
import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401 - its libraries must be there before the module's

from tests.cuda_on_host.build import ROOT, build

NAME = "rlhf_kernels._C"
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\s*\(")


def load():
    if "rlhf_kernels" in sys.modules:
        raise pytest.UsageError("tests.cuda_on_host.plugin came too late: rlhf_kernels is already imported")
    path = os.environ.get("RK_CUDA_ON_HOST_MODULE") or build(asan=os.environ.get("RK_CUDA_ON_HOST_ASAN") == "1")
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module  # where rlhf_kernels._extension finds it before the installed one
    import rlhf_kernels._extension as extension

    if not extension.native_available() or extension.module() is not module:
        raise pytest.UsageError(f"rlhf_kernels did not take CUDA on the host: {extension.why_not_native()}")
    from rlhf_kernels import _workspace

    _workspace.logits_to_keep = lambda *_: 0  # or, at a test's sizes, nothing would be recomputed
    return module


module = load()
launched = collections.Counter()  # by the workers of pytest-xdist, {instance: times}


def launches():
    """{(file below csrc/, kernel, instance): times it was launched}, of all instances that were compiled."""
    library = ctypes.CDLL(module.__file__)
    library.rk_cuda_on_host_launches.restype = ctypes.c_char_p
    counts = collections.Counter()
    for line in library.rk_cuda_on_host_launches().decode().splitlines():
        count, file, kernel, instance = line.split("\t")
        name = re.match(r"\(?(\w+)", kernel).group(1)
        counts[file.rpartition("/csrc/")[2], name, f"{kernel} in {instance}"] += int(count)
    return counts


def kernels_in_sources():
    """{(file below csrc/, kernel)}, whether launched anywhere or not."""
    csrc = ROOT / "csrc"
    files = [path for path in sorted(csrc.rglob("*")) if path.suffix in (".cu", ".cuh", ".h")]
    return {(str(path.relative_to(csrc)), name) for path in files for name in KERNEL.findall(path.read_text())}


def pytest_addoption(parser):
    parser.addoption("--every-kernel", action="store_true", help="fail where a kernel's instance was never launched")


def pytest_report_header():
    return f"CUDA kernels on the host: {module.__file__}, schedule {os.environ.get('RK_CUDA_ON_HOST_SCHEDULE', '0')}"


def never_launched():
    times = launches() + collections.Counter()  # without those launched no times
    times.update(launched)
    kernels = sorted(kernels_in_sources() - {key[:2] for key in times})
    return kernels, sorted(set(launches()) - set(times))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = [[*key, count] for key, count in launches().items() if count]
    elif session.config.getoption("--every-kernel") and any(never_launched()) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for *key, count in getattr(node, "workeroutput", {}).get("launches", []):
        launched[tuple(key)] += count


def pytest_terminal_summary(terminalreporter, config):
    kernels, instances = never_launched()
    everything = len(kernels_in_sources()), len(launches())
    terminalreporter.section("CUDA kernels on the host")
    terminalreporter.write_line(
        f"launched {everything[0] - len(kernels)} of {everything[0]} kernels, "
        f"{everything[1] - len(instances)} of {everything[1]} instances"
    )
    for file, kernel in kernels:
        terminalreporter.write_line(f"never launched: {kernel} of {Path('csrc') / file}")
    if config.getoption("--every-kernel"):
        for file, _, instance in instances:
            terminalreporter.write_line(f"never launched: {Path('csrc') / file}: {instance}")
