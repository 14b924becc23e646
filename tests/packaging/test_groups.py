"""tests/conftest.py: pytest-xdist finds a test's group at the end of its id."""

import pytest


@pytest.mark.xdist_group("example")
@pytest.mark.parametrize("value", [1])
def test_the_id_ends_with_the_group(request, value):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("takes -n and --dist loadgroup, as make test has it")
    assert request.node.nodeid.endswith("test_the_id_ends_with_the_group[1]@example")
