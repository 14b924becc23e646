"""The Python of docs/integrations.md is run as printed: the blocks of each section, one after another."""

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import overlays

PAGE = Path(__file__).resolve().parents[2] / "docs/integrations.md"
TEXT = PAGE.read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
INTRODUCTION, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
TITLES = {section.splitlines()[0]: section for section in SECTIONS}
WITH_CODE = [title for title, section in TITLES.items() if BLOCK.search(section)]


def run(text, namespace):
    """Each block at its own line of the page, so that an error names it."""
    for block in BLOCK.finditer(text):
        line = TEXT.count("\n", 0, TEXT.index(block[1]))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)


def without_gpu_packages(package, monkeypatch):
    """The parts of verl and OpenRLHF that can be imported here: see test_verl.py and test_openrlhf.py."""
    try:
        folder = overlays.folder_of(package)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])


def prepare_verl(monkeypatch, tmp_path, namespace):
    without_gpu_packages("verl", monkeypatch)
    kernel = overlays.without_init("verl", "utils.kernel.linear_cross_entropy")
    monkeypatch.setattr(kernel, "linear_cross_entropy", kernel.linear_cross_entropy)


def prepare_openrlhf(monkeypatch, tmp_path, namespace):
    from tests.integrations import openrlhf_here

    without_gpu_packages("openrlhf", monkeypatch)
    actor = openrlhf_here.load("models.actor").Actor
    package = sys.modules["openrlhf.models"]
    monkeypatch.setattr(sys.modules["openrlhf"], "models", package, raising=False)
    monkeypatch.setattr(package, "Actor", actor, raising=False)
    namespace["tiny_model"]().save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)


PREPARATIONS = {"verl": prepare_verl, "OpenRLHF": prepare_openrlhf}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^):]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        assert (PAGE.parent / path).exists(), f"{target} is not there"
        if not path:
            assert anchor in {title.lower().replace(" ", "-") for title in TITLES}, f"no heading for #{anchor}"


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|no `val_dataloader`).*")
@pytest.mark.parametrize("title", WITH_CODE)
def test_blocks_run_as_printed(title, monkeypatch, tmp_path):
    namespace = {}
    run(INTRODUCTION, namespace)
    if title in PREPARATIONS:
        PREPARATIONS[title](monkeypatch, tmp_path, namespace)
    try:
        run(TITLES[title], namespace)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
