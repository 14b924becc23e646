"""Backends, device and memory for the kernel tests.

A test that takes `backend` runs once for each backend. Without the compiled extension the native ones are skipped and
say why; with CI=true or RLHF_KERNELS_REQUIRE_NATIVE=1 they fail instead. RLHF_KERNELS_TEST_DEVICE chooses the device.
"""

import os

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _dispatch

BACKENDS = ("reference", "native")
DEVICE = torch.device(os.environ.get("RLHF_KERNELS_TEST_DEVICE", "cpu"))
collect_ignore = [] if DEVICE.type == "cuda" else ["test_cuda_device.py"]
NATIVE_REQUIRED = (
    os.environ.get("CI", "").lower() in ("1", "true") or os.environ.get("RLHF_KERNELS_REQUIRE_NATIVE") == "1"
)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


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
