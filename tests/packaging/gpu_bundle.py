"""What is carried to a borrowed GPU machine, so that nothing is compiled or missing there: `make gpu-bundle` makes it.

build/gpu-bundle holds the extension with its build report, the peers' wheels, and manifest.json; benchmarks/on_gpu.py
puts them in place where they fit. `python -m tests.packaging.gpu_bundle FOLDER` completes it from the folder in which
rlhf_kernels was built; `... try` runs, without a GPU, every peer that it brings.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from benchmarks.harness.grpo import GRPO
from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.harness.measuring import reason_of
from benchmarks.harness.peers import ROOT, TRL
from benchmarks.harness.record import PARTS
from rlhf_kernels import _extension
from rlhf_trainer.studies.machine import commit

BUNDLE, SITE = ROOT / "build/gpu-bundle", ROOT / "build/gpu-site"
MOST_MIB = 64
REPORT = "_build_report.json"


def digest_of_sources() -> str:
    """Of what the extension is compiled from."""
    digest = hashlib.sha256()
    paths = [
        ROOT / "setup.py",
        ROOT / "setup_cuda.py",
        *(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
    ]
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def manifest() -> dict:
    """Empty where there is no bundle."""
    path = BUNDLE / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def misfit(capability: str) -> str | None:
    """Why the bundle's extension does not serve here; None where it does. `capability` is the GPU's, "9.0"."""
    if not (bundle := manifest()):
        return f"there is no {BUNDLE.relative_to(ROOT)}"
    if bundle["sources"] != digest_of_sources():
        return "csrc has changed since it was built"
    arches = bundle["report"]["cuda_arches"]
    if capability and capability not in arches.replace("+PTX", "").split(";"):
        return f"it was compiled for {arches}, and this GPU has {capability}"
    return _extension._misfit(bundle["report"])


def put_in_place(capability: str, compile_it: bool) -> subprocess.Popen | None:
    """Unpacks the peers where they are for this Python, and installs the extension where it fits; else starts, if that
    is wanted, to compile it in place, for this GPU alone."""
    shutil.rmtree(SITE, ignore_errors=True)
    if manifest().get("report", {}).get("python") == sys.implementation.cache_tag:
        for wheel in (BUNDLE / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(SITE)
    reason = misfit(capability)
    print(f"the extension of build/gpu-bundle is {f'not used: {reason}' if reason else 'used'}", flush=True)
    if reason is None:
        for path in (BUNDLE / REPORT, *BUNDLE.glob("_C.*")):
            shutil.copy2(path, ROOT / "rlhf_kernels" / path.name)
    if reason is None or not compile_it:
        return None
    wanted = {"RLHF_KERNELS_NATIVE": "1", "RLHF_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    options = {"stdout": (PARTS / "build.log").open("w"), "stderr": subprocess.STDOUT, "env": os.environ | wanted}
    return subprocess.Popen([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, **options)


def try_peers() -> dict[str, str]:
    """By contender and op, what comes of a step on the CPU at a tiny shape; those made for GPUs fail behind their
    imports, which is what this is about."""
    outcomes = {}
    for op in (LinearLogprobs, LinearKL, LinearDPO, GRPO):
        case = op(72, 32, 133, backends=(), dtype=torch.bfloat16)
        case.make()
        for peer in case.others():
            try:
                case.step(peer)
                outcome = "runs"
            except Exception as error:
                outcome = reason_of(error)
            outcomes[f"{peer.name}, {op.op}"] = outcome
    return outcomes


def fill(built: Path) -> float:
    """Its MiB."""
    for path in (built / REPORT, *built.glob("_C.*")):
        shutil.copy2(path, BUNDLE / path.name)
    wheels = sorted(path.name for path in (BUNDLE / "wheels").iterdir())
    content = {"commit": commit(ROOT), "sources": digest_of_sources(), "wheels": wheels}
    content["report"] = json.loads((BUNDLE / REPORT).read_text())
    (BUNDLE / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")
    return sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) / 2**20


def main(argument: str) -> None:
    if argument == "try":
        outcomes = try_peers()
        print(*(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")
        carried = {name: outcome for name, outcome in outcomes.items() if name.startswith((TRL, "CCE", "Liger"))}
        if missing := [name for name, outcome in carried.items() if outcome.startswith("not installed")]:
            raise SystemExit(f"they import what is not there: {', '.join(missing)}")
        return
    mib = fill(Path(argument))
    for path in sorted(path for path in BUNDLE.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(BUNDLE)}")
    print(f"{mib:8.2f} MiB in all, of {MOST_MIB}")
    if mib > MOST_MIB:
        raise SystemExit(f"build/gpu-bundle has {mib:.1f} MiB, more than the {MOST_MIB} that can be carried")


if __name__ == "__main__":
    main(sys.argv[1])
