"""What quantizes for the trainer, each package where it is wanted: tests/trainer skips what these make possible.

Both lie apart, as peft loads them wherever they are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "tests/trainer/models/test_four_bits.py": ("bitsandbytes-0.50.2",),
    "tests/trainer/training/test_optimizers.py": ("bitsandbytes-0.50.2", "torchao-0.18.0"),
}


@pytest.mark.parametrize(("file", "packages"), CASES.items())
def test_all_of_it_with_the_packages(file, packages):
    folders = [ROOT / "build/peers" / package for package in packages]
    for folder in folders:
        if not folder.is_dir():
            pytest.skip(f"{folder.name} is not installed in build/peers: make hosts")
    paths = os.pathsep.join(map(str, [*folders, ROOT]))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", file], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-2000:]
