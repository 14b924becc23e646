"""Tests of hosts that are not installed are skipped, with the reason. Where RLHF_KERNELS_REQUIRE_HOSTS=1 says that all
of them are there, they fail instead."""

import gc
import os

import pytest

# What every such reason has, and no other one.
MISSING = "not installed"


def fail_if_missing(report):
    if os.environ.get("RLHF_KERNELS_REQUIRE_HOSTS") == "1" and report.skipped and MISSING in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"RLHF_KERNELS_REQUIRE_HOSTS=1, but {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_if_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_missing((yield))


@pytest.fixture(autouse=True, scope="module")
def without_imports_in_the_garbage():
    """Trainers collect garbage when they start and end. Looking through all that transformers, TRL and peft consist of
    took half of these tests' time; what is there when a file begins stays out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
