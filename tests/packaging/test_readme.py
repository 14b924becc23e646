"""The code in the README is run as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_has_code():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code):
    exec(compile(code, str(README), "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), f"README links to {target}, which is not there"
