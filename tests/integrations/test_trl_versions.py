"""The tests of TRL's trainers once more, in a process of their own, with another version of TRL in front."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/integrations/test_trl.py", "tests/integrations/test_trl_options.py")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("version", ["1.13.0"])
def test_all_of_it_with_an_older_trl(version, file):
    folder = ROOT / f"build/peers/trl-{version}"
    if not folder.is_dir():
        pytest.skip(f"TRL {version} is not installed in build/peers: make hosts")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", file], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed >= 20, run.stdout[-2000:]
