"""Tests of one `xdist_group` run in one worker, so that what they share, such as a launch, is done once."""

import os

import pytest

# Inductor reads it when imported: its pool of compiling processes outlives a test, and times out on a busy machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """pytest-xdist 3.8 appends the group to an attribute that pytest 9.2 does not read any more, and so schedules
    groups as if there were none. This appends it to the id that is read."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        if mark is not None and "@" not in item.nodeid.rpartition("]")[2] and hasattr(item, "_id"):
            item._id = type(item._id).parse(f"{item.nodeid}@{mark.args[0]}")
