"""Which implementation runs, what is said when it cannot, and the two settings: backend and workspace budget."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from rlhf_kernels import _dispatch, _extension, _triton, _workspace
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
    if device.type == "cpu":
        assert "triton" in unable, "Triton kernels exist now: add them to the backends of conftest.py"


@pytest.mark.parametrize("name", OPS)
def test_native_says_that_it_has_no_float64(native, device, name):
    with pytest.raises(ValueError, match=r"'native' cannot run here: .*float64.*Backends that can: reference"):
        calls(device, torch.float64)[name]("native")


class CompiledOps(TorchDispatchMode):
    """The names of the compiled ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_kernels":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
def test_auto_takes_native_where_it_runs(native, device, name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with CompiledOps() as compiled:
            calls(device, dtype)[name]("auto")
        assert bool(compiled.names) == (dtype != torch.float64)


@pytest.mark.parametrize("name", ["kl_penalty", "dpo_loss", "bradley_terry_loss"])
def test_what_native_takes_as_it_is_equals_what_is_looked_at_first(native, device, name, monkeypatch):
    """The short cut of the losses on a number a response changes neither values nor which op runs."""

    def run():
        with CompiledOps() as compiled:
            result = calls(device)[name]("native")
        return compiled.names, result

    names, short = run()
    for module in ("bradley_terry", "dpo.pairwise", "kl"):
        monkeypatch.setattr(f"rlhf_kernels.{module}.ready_for_native", lambda *_: False)
    long_names, long = run()
    assert names == long_names == {name}
    torch.testing.assert_close(short, long, rtol=0, atol=0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(backend, device, requires_grad):
    """Rather than taking a tangent for none and the derivative for zero."""
    head = T.make_head(4, 3, 5, device=device)
    zeros, pair = torch.zeros(2, device=device), [torch.tensor([i], device=device) for i in (0, 1)]
    options = {"backend": backend}

    def dual(tensor):
        return forward_ad.make_dual(tensor.clone().requires_grad_(requires_grad), torch.ones_like(tensor))

    with forward_ad.dual_level():
        hidden, weight, x = dual(head.hidden), dual(head.weight), dual(zeros)
        refused = [
            lambda: rk.linear_logprobs(hidden, head.weight, head.targets, **options),
            lambda: rk.linear_logprobs(head.hidden, weight, head.targets, **options),
            lambda: rk.linear_kl(hidden, head.weight, head.hidden, head.weight, **options),
        ]
        if backend != "reference":  # whose small losses, plain torch, have a forward mode
            refused += [
                lambda: rk.kl_penalty(zeros, x, **options),
                lambda: rk.dpo_loss(x, zeros, *pair, **options),
                lambda: rk.dpo_loss(zeros, x, *pair, **options),
                lambda: rk.bradley_terry_loss(zeros, x, **options),
            ]
        for call in refused:
            with pytest.raises(RuntimeError, match="jvp"):
                call()

    def logprobs(hidden):
        return rk.linear_logprobs(hidden, *head[1:], **options).logprobs

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(logprobs, (head.hidden,), (head.hidden,))


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(_extension, "native_available", lambda: False)
    monkeypatch.setattr(_extension, "why_not_native", lambda: "it was left out for this test")
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_auto_takes_triton_on_a_gpu_without_native(no_native, device, monkeypatch):
    """And warns of nothing, as it falls to no reference."""
    warnings.filterwarnings("error", message=".*reference backend")
    if device.type == "cpu":
        monkeypatch.setattr(_triton, "why_not_on", lambda device: None)
        assert _dispatch.resolve_backend("auto", torch.device("cuda"), torch.float32) == "triton"
        return
    for name in OPS:
        with CompiledOps() as compiled:
            calls(device)[name]("auto")
        assert compiled.names and all(op.startswith("triton_") for op in compiled.names), name


def test_auto_warns_once_when_it_falls_to_the_reference(no_native, device, monkeypatch):
    monkeypatch.setattr(_triton, "why_not_on", lambda device: "so was Triton")
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
    with pytest.raises(TypeError, match="mib must be an int or None"):
        rk.set_workspace_budget(wrong)


@pytest.mark.parametrize("wrong", [7, 0, -1])
def test_a_workspace_budget_has_a_lower_bound(wrong):
    with pytest.raises(ValueError, match=rf"mib must be >= 8, got {wrong}"):
        rk.set_workspace_budget(wrong)


@pytest.mark.parametrize("wrong", [2**40 + 1, 2**63, 2**80])
def test_a_workspace_budget_that_no_device_counts_changes_nothing(wrong):
    try:
        rk.set_workspace_budget(37)
        with pytest.raises(ValueError, match=rf"mib must be <= {2**40}, got {wrong}"):
            rk.set_workspace_budget(wrong)
        assert rk.build_info()["workspace_budget_mib"] == {"cpu": 37, "cuda": 37}
        rk.set_workspace_budget(2**40)
        head = [leaf.requires_grad_() for leaf in (T.randn(70, 8, seed=1), T.randn(300, 8, seed=2))]
        rk.linear_logprobs(*head, torch.arange(70)).logprobs.sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in head)
    finally:
        rk.set_workspace_budget(None)


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", "{}", '{"native": "yes"}', "{", "[" * 100_000, "9" * 5000, "\0"]
)
def test_a_build_report_that_is_none_is_damaged(content, monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    (tmp_path / "_build_report.json").write_text(content)
    report = _extension._read_report()
    assert report["native"] is False and "_build_report.json is damaged (" in report["native_reason"]
    assert _extension._load(report)[0] is None


def test_the_workspace_budget_is_reported():
    try:
        rk.set_workspace_budget(37)
        assert rk.build_info()["workspace_budget_mib"] == {"cpu": 37, "cuda": 37}
        rk.set_workspace_budget(None)
        cpu = _workspace.default_mib(_workspace.memory_bytes())
        assert rk.build_info()["workspace_budget_mib"] == {"cpu": cpu, "cuda": 256}
    finally:
        rk.set_workspace_budget(None)


def test_the_default_budget_is_a_share_of_memory(monkeypatch, tmp_path):
    gib = 2**30
    memories = (gib // 2, 4 * gib, 24 * gib, 512 * gib)
    assert [_workspace.default_mib(memory) for memory in memories] == [64, 128, 768, 1024]
    machine = _workspace.memory_bytes()
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text(f"{gib}\n")
    none.write_text("max\n")
    monkeypatch.setattr(_workspace, "CGROUP_LIMITS", (str(none), str(limit), str(tmp_path / "missing")))
    assert _workspace.memory_bytes() == gib
    monkeypatch.setattr(_workspace, "CGROUP_LIMITS", (str(none),))
    assert _workspace.memory_bytes() >= machine


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
    message = _extension.why_not_on(torch.device("cuda"))
    assert message is None if reason is None else reason in message
