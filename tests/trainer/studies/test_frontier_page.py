"""docs/frontier.md says what docs/frontier.json holds, which `rlhf frontier` wrote."""

import json
from pathlib import Path

import pytest

from rlhf_trainer.studies.frontier.report import report_of

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def found():
    return json.loads((DOCS / "frontier.json").read_text(encoding="utf-8"))


def test_the_page_has_the_report_of_these_results(found):
    page = (DOCS / "frontier.md").read_text(encoding="utf-8")
    expectations, report = report_of(found)
    assert report in page
    assert expectations == found["expectations"]
    commits = {point["commit"] for point in [*found["points"], *found["overoptimisation"]]}
    assert all(commit in page and "dirty" not in commit for commit in commits)
    assert found["commit"] in page and found["device"] in page
    for picture in ("images/frontier.svg", "images/overoptimisation.svg"):
        assert picture in page and (DOCS / picture).is_file()


def test_the_results_are_of_a_commit_and_of_enough_seeds(found):
    assert "dirty" not in found["commit"]
    assert {len({p["seed"] for p in found[key]}) for key in ("points", "overoptimisation")} == {3, 9}
    assert all(point["train_cpu_seconds"] > 0 for point in [*found["points"], *found["overoptimisation"]])
