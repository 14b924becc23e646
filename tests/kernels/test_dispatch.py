"""Which implementation runs, what is said when it cannot, and the two settings: backend and workspace budget."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _dispatch, _extension
from rlhf_kernels import testing as T


def calls(device, dtype=torch.float32):
    """Every public op with the smallest inputs, as functions of the backend."""
    head = T.make_head(4, 3, 5, dtype=dtype, device=device)
    hidden, labels = head.hidden.view(2, 2, 3), head.targets.view(2, 2)
    x, pair = (
        torch.zeros(2, dtype=dtype, device=device),
        (torch.tensor([0], device=device), torch.tensor([1], device=device)),
    )
    return {
        "linear_logprobs": lambda b: rk.linear_logprobs(*head, backend=b),
        "sequence_logprobs": lambda b: rk.sequence_logprobs(hidden, head.weight, labels, backend=b),
        "linear_kl": lambda b: rk.linear_kl(head.hidden, head.weight, head.hidden, head.weight, backend=b),
        "kl_penalty": lambda b: rk.kl_penalty(x, x, backend=b),
        "dpo_loss": lambda b: rk.dpo_loss(x, x, *pair, backend=b),
        "bradley_terry_loss": lambda b: rk.bradley_terry_loss(x, x, backend=b),
        "linear_dpo_loss": lambda b: rk.linear_dpo_loss(hidden, head.weight, labels, x, backend=b),
    }


OPS = list(calls("cpu"))


def test_native_is_there_where_it_must_be(native):
    assert native in rk.available_backends()


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_backend_raises_and_lists_the_known(device, name):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, native, triton; got 'cuda'"):
        calls(device)[name]("cuda")


@pytest.mark.parametrize("name", OPS)
def test_a_backend_that_cannot_run_raises_and_lists_those_that_can(device, name):
    unable = [b for b in _dispatch.BACKENDS[1:] if b not in rk.available_backends(device)]
    for backend in unable:
        with pytest.raises(
            ValueError, match=rf"backend='{backend}' cannot run here: .+ Backends that can: .*reference"
        ):
            calls(device)[name](backend)
    assert "triton" in unable, "Triton kernels exist now: add them to the backends of conftest.py"


@pytest.mark.parametrize("name", OPS)
def test_native_says_that_it_has_no_float64(native, device, name):
    with pytest.raises(ValueError, match=r"'native' cannot run here: .*float64.*Backends that can: reference"):
        calls(device, torch.float64)[name]("native")


@pytest.mark.parametrize("name", OPS)
def test_auto_takes_native_where_it_runs(native, device, name, monkeypatch):
    chosen = []
    resolve = _dispatch.resolve_backend

    def spy(*args):
        chosen.append(resolve(*args))
        return chosen[-1]

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("rlhf_kernels") and hasattr(module, "resolve_backend"):
            monkeypatch.setattr(module, "resolve_backend", spy)
    calls(device)[name]("auto")
    assert chosen and set(chosen) == {"native"}
    chosen.clear()
    calls(device, torch.float64)[name]("auto")
    assert set(chosen) == {"reference"}


def test_auto_warns_once_when_it_falls_to_the_reference(device, monkeypatch):
    monkeypatch.setattr(_extension, "native_available", lambda: False)
    monkeypatch.setattr(_extension, "why_not_native", lambda: "it was left out for this test")
    monkeypatch.setattr(_dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="slower reference backend: it was left out for this test"):
        calls(device)["linear_logprobs"]("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(device)["linear_kl"]("auto")
        calls(device, torch.float64)["linear_logprobs"]("auto")
    assert rk.available_backends(device) == ("reference",)
    with pytest.raises(ValueError, match="'native' cannot run here: it was left out for this test"):
        calls(device)["linear_logprobs"]("native")


def test_available_backends(device):
    assert rk.available_backends(device)[0] == "reference"
    assert rk.available_backends(device, torch.float64) == ("reference",)
    assert "native" not in rk.available_backends("meta")
    assert rk.available_backends() == rk.available_backends("cpu")


def test_build_info_is_made_to_be_printed():
    info = rk.build_info()
    assert isinstance(info, dict) and str(info)
    assert isinstance(info["native"], bool)
    assert info["native"] == ("native" in rk.available_backends("cpu"))
    assert (info["native_reason"] is None) == info["native"], "what is missing has a reason"


def test_every_public_name_is_there_and_documented():
    assert sorted(rk.__all__) == rk.__all__
    for name in rk.__all__:
        thing = getattr(rk, name)
        assert thing.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("wrong", [64.0, "64", [], True])
def test_a_workspace_budget_is_a_whole_number(wrong):
    with pytest.raises(TypeError, match="mebibytes must be an int or None"):
        rk.set_workspace_budget(wrong)


@pytest.mark.parametrize("wrong", [7, 0, -1])
def test_a_workspace_budget_has_a_lower_bound(wrong):
    with pytest.raises(ValueError, match=rf"mebibytes must be >= 8, got {wrong}"):
        rk.set_workspace_budget(wrong)


def test_the_workspace_budget_is_reported():
    try:
        rk.set_workspace_budget(37)
        assert rk.build_info()["workspace_budget_mib"] == {"cpu": 37, "cuda": 37}
        rk.set_workspace_budget(None)
        assert rk.build_info()["workspace_budget_mib"] == {"cpu": 64, "cuda": 256}
    finally:
        rk.set_workspace_budget(None)


def test_importing_is_light():
    """No Triton, no transformers, no compiler: floor 1 imports torch alone, the rest on demand."""
    code = """
        import sys, torch
        before = set(sys.modules)
        import rlhf_kernels
        heavy = {"triton", "transformers", "trl", "datasets", "accelerate", "matplotlib", "rlhf_trainer", "pytest"}
        found = heavy & {name.split(".")[0] for name in set(sys.modules) - before}
        assert not found, found
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_testing_needs_no_test_framework():
    code = "import sys, rlhf_kernels.testing; assert 'pytest' not in sys.modules and 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arches", "capability", "reason"),
    [
        ("8.0;9.0+PTX", (9, 0), None),
        ("8.0;9.0+PTX", (10, 0), None),  # by PTX
        ("8.0;9.0+PTX", (7, 5), "8.0 and newer, and this GPU has 7.5"),
        ("9.0", (8, 6), "9.0 and newer, and this GPU has 8.6"),
        ("Hopper", (7, 0), None),  # names are torch's business
    ],
)
def test_a_gpu_older_than_the_kernels_is_told_before_one_starts(monkeypatch, arches, capability, reason):
    monkeypatch.setattr(_extension, "_report", {"cuda_arches": arches})
    monkeypatch.setattr(_extension, "native_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = _extension.why_not_on(torch.device("cuda"))
    assert said is None if reason is None else reason in said
