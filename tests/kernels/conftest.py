"""Backends, device and memory for the kernel tests.

A test that takes `backend` runs once for each backend, but those that its module names WITHOUT. Without the compiled
extension the native ones are skipped and say why; with CI=true or RLHF_KERNELS_REQUIRE_NATIVE=1 they fail instead.
RLHF_KERNELS_TEST_DEVICE chooses the device.
Triton is among the backends on a GPU; under its interpreter (TRITON_INTERPRET=1) it is the only one.
"""

import os
import re

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _dispatch, _triton, _workspace

DEVICE = torch.device(os.environ.get("RLHF_KERNELS_TEST_DEVICE", "cpu"))
BACKENDS = ("reference", "native") + (("triton",) if DEVICE.type == "cuda" else ())
if _triton.INTERPRETED:
    BACKENDS = ("triton",)
collect_ignore = [] if DEVICE.type == "cuda" else ["test_cuda_device.py", "triton/test_triton_device.py"]
if DEVICE.type != "cuda" and not _triton.INTERPRETED:
    collect_ignore += ["triton/test_triton_chunks.py", "triton/test_triton_interpreted.py"]
if _triton.INTERPRETED:
    collect_ignore += ["triton/test_triton_compiled.py", "triton/test_triton_traced.py"]
NATIVE_REQUIRED = (
    os.environ.get("CI", "").lower() in ("1", "true") or os.environ.get("RLHF_KERNELS_REQUIRE_NATIVE") == "1"
)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        without = getattr(metafunc.module, "WITHOUT", ())
        metafunc.parametrize("backend", [name for name in BACKENDS if name not in without], indirect=True)


LONG = {  # of some tests' parameters: what a smaller one shows as well, where tiles have 64 to 128 columns
    "shape": {(33, 64, 2047), (65, 48, 2048), (66, 64, 32003), (66, 64, 64, 8191), (6, 64, 48, 2050)},
    "sizes": {(100, 1000)},
    "lengths": {(64, 33, 128, 3)},
}
# Names of tests of sizes, of threads or bits, and of torch.compile, which test_triton_traced.py looks at.
OF_SOMETHING_ELSE = re.compile(
    r"budget|test_memory|test_large|test_fuzz|same_gradient_twice|test_compile|top1_|test_gradcheck"
)
OF_DTYPES = re.compile(r"shapes|values|closed_forms|upstream|all_rows|ignored_rows|bad_counted|masked_row")


def interpreted(item):
    """Whether the interpreter, which is slow, runs a test: of the Triton kernels, each instance and option once.

    fp16 takes the way of bf16 there (both are multiplied as fp32, and torch rounds), and bf16 that of fp32 but where a
    test is about dtypes. Of the distances of a KL both ends stay, of its kinds of logits and of banned tokens the
    extremes.
    """
    if not ("backend" in item.fixturenames or "test_triton" in item.nodeid) or OF_SOMETHING_ELSE.search(item.nodeid):
        return False
    values = item.callspec.params if hasattr(item, "callspec") else {}
    name, dtype = item.originalname, values.get("dtype")
    if any(tuple_of(values.get(key)) in long for key, long in LONG.items()):
        return "sigmoid" in values.get("case", ())  # a pair of sizes in which one response has many pairs, once
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not OF_DTYPES.search(name)):
        return False
    if name == "test_tokens_banned_by_a_bias_of_minus_infinity":
        return values["banned"] in ("whole tiles", "the target")
    if "linear_kl.py" in item.nodeid:
        return {
            "test_near_and_far_from_the_reference": values.get("kl") in (1e-8, 10.0),
            "test_far_apart_without_overflow": values.get("kind") in ("large", "negative"),
            "test_near_the_reference_with_large_logits": values.get("kl") == 1e-8,
            "test_models_of_different_dtypes": values.get("policy") == torch.bfloat16,
            "test_identical_models_are_exactly_0": values.get("direction") == "policy_ref",
            "test_shapes": dtype == torch.float32 or values.get("shape", (0, 0))[1] < 1000,
        }.get(name, True)
    return True


def tuple_of(value):
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else None


def pytest_collection_modifyitems(config, items):
    if not _triton.INTERPRETED:
        return
    kept, left = [], []
    for item in items:
        (kept if interpreted(item) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def require(backend):
    reason = _dispatch.why_not(backend, DEVICE, torch.float32)
    if reason is not None:
        (pytest.fail if NATIVE_REQUIRED else pytest.skip)(f"no {backend} backend: {reason}")
    return backend


@pytest.fixture
def backend(request):
    return require(request.param)


@pytest.fixture
def native():
    """The native backend alone, for promises that the reference does not make."""
    return require("native")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def on_cuda(request):
    """Whether the native backend's kernels are CUDA's: on a GPU, or executed on the host (tests/cuda_on_host)."""
    return DEVICE.type == "cuda" or request.config.pluginmanager.hasplugin("tests.cuda_on_host.plugin")


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN (or the largest integer), so an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def kept_logits():
    """For tests of what is kept for backward: see `recomputed_logits`."""


@pytest.fixture(autouse=True)
def recomputed_logits(request, monkeypatch):
    """At a test's shapes all logits would be kept, and nothing be recomputed. test_kept_logits.py compares the two."""
    if "kept_logits" not in request.fixturenames:
        monkeypatch.setattr(_workspace, "logits_to_keep", lambda *arguments: 0)


@pytest.fixture
def small_budget():
    """The smallest workspace: many chunks and tiles even at the sizes of a test."""
    rk.set_workspace_budget(8)
    yield 8
    rk.set_workspace_budget(None)


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes here are too small for more, which would mostly wait for each other and for pytest-xdist's workers.
    Tests about threads set their own number; it is put back here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
