"""docs/frontier.md says what docs/frontier.json holds, which `rlhf frontier` wrote."""

import json
from pathlib import Path

import pytest

from rlhf_trainer.studies.frontier.report import report_of

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "frontier.json").read_text(encoding="utf-8"))


def test_the_page_has_the_report_of_these_results(results):
    page = (DOCS / "frontier.md").read_text(encoding="utf-8")
    expectations, report = report_of(results)
    assert report in page
    assert expectations == results["expectations"]
    commits = {point["commit"] for point in [*results["points"], *results["overoptimisation"]]}
    assert all(commit in page and "dirty" not in commit for commit in commits)
    assert results["commit"] in page and results["device"] in page
    for picture in ("images/frontier.svg", "images/overoptimisation.svg"):
        assert picture in page and (DOCS / picture).is_file()


def test_the_results_are_of_a_commit_and_of_enough_seeds(results):
    assert "dirty" not in results["commit"]
    assert {len({p["seed"] for p in results[key]}) for key in ("points", "overoptimisation")} == {3, 9}
    assert all(point["train_cpu_seconds"] > 0 for point in [*results["points"], *results["overoptimisation"]])
