"""When the extension of build/gpu-bundle is used. Making it takes nvcc and another torch: `make gpu-bundle`."""

import json
import zipfile

import pytest
import torch

from rlhf_kernels._extension import build_report
from tests.packaging import gpu_bundle


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """bundle(key=value): one for this machine, but for these keys of its build report."""
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    for name in ("BUNDLE", "SITE", "PARTS"):
        monkeypatch.setattr(gpu_bundle, name, folder := tmp_path / name.lower())
        folder.mkdir()
    monkeypatch.setattr(gpu_bundle, "digest_of_sources", lambda: "of these")
    (tmp_path / "rlhf_kernels").mkdir()
    (gpu_bundle.BUNDLE / "wheels").mkdir()
    with zipfile.ZipFile(gpu_bundle.BUNDLE / "wheels/peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "")
    (gpu_bundle.BUNDLE / "_C.so").write_text("the extension")

    def make(sources="of these", **report):
        torch_here = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cuda": False}
        report = build_report() | torch_here | {"cuda_arches": "8.0;9.0"} | report
        (gpu_bundle.BUNDLE / gpu_bundle.REPORT).write_text(json.dumps(report))
        (gpu_bundle.BUNDLE / "manifest.json").write_text(json.dumps({"sources": sources, "report": report}))

    return make


def test_one_that_fits_is_put_in_place(bundle):
    bundle()
    assert gpu_bundle.put_in_place("9.0", compile_it=True) is None
    assert (gpu_bundle.ROOT / "rlhf_kernels/_C.so").read_text() == "the extension"
    assert json.loads((gpu_bundle.ROOT / "rlhf_kernels/_build_report.json").read_text())["cuda_arches"] == "8.0;9.0"
    assert (gpu_bundle.SITE / "peer.py").exists()


@pytest.mark.parametrize(
    "differs, capability, reason",
    [
        ({"sources": "of others"}, "9.0", "csrc has changed since it was built"),
        ({}, "10.0", "it was compiled for 8.0;9.0, and this GPU has 10.0"),
        ({"torch": "1.0"}, "9.0", "it was compiled against torch 1.0"),
        ({"python": "cpython-99"}, "9.0", "it was compiled for cpython-99"),
    ],
)
def test_one_that_does_not_fit_is_left(bundle, capsys, differs, capability, reason):
    """The peers serve nevertheless, unless they are for another Python."""
    bundle(**differs)
    assert gpu_bundle.put_in_place(capability, compile_it=False) is None
    assert reason in capsys.readouterr().out and list((gpu_bundle.ROOT / "rlhf_kernels").iterdir()) == []
    assert (gpu_bundle.SITE / "peer.py").exists() == ("python" not in differs)


def test_without_one_it_is_compiled(bundle):
    """In the background, in the checkout; here it fails, as there is no setup.py."""
    build = gpu_bundle.put_in_place("9.0", compile_it=True)
    assert build.wait() != 0 and "setup.py" in (gpu_bundle.PARTS / "build.log").read_text()
