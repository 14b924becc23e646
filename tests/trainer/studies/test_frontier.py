"""`rlhf frontier`, the command: a run smaller than --quick, gone on with, in processes, and stopped by an error."""

import json

import pytest
from matplotlib import image

from rlhf_trainer.errors import UsageError
from rlhf_trainer.studies.config import FrontierConfig
from rlhf_trainer.studies.frontier import run as frontier
from rlhf_trainer.studies.frontier.language import all_prompts, hidden_reward
from rlhf_trainer.studies.frontier.methods import QUICK, Method, World, write_pairs

pytestmark = pytest.mark.xdist_group("frontier")  # one worker, one run
SMALL = QUICK._replace(
    demonstrations=512,
    ppo_iterations=1,
    grpo_iterations=1,
    reward_pairs=(50, 200),
    betas=(1.0,),
    counts=(2,),
    pairs=200,
)
TIMES = ("train_seconds", "train_cpu_seconds", "measure_seconds", "seconds_of_this_run", "measured", "commit")


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "QUICK", SMALL)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small):
    output = tmp_path_factory.mktemp("frontier") / "out"
    return frontier.run(FrontierConfig(output_dir=str(output), quick=True, workers=1))


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "frontier.json").read_text())


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_it_leaves_numbers_a_report_and_both_pictures(folder, results):
    report = (folder / "report.txt").read_text()
    for point in results["points"]:
        assert point["method"] in report
    for name in ("frontier", "overoptimisation"):
        assert image.imread(folder / f"{name}.png").shape[:2] > (300, 300)
        assert "<svg" in (folder / f"{name}.svg").read_text()


def test_the_numbers_say_where_from_and_how_long(results):
    assert {"device", "versions", "commit", "measured", "sizes", "seed"} <= set(results)
    methods = {"rejection sampling + SFT", "DPO", "PPO", "GRPO", "DPO, half from PPO"}
    assert {point["method"] for point in results["points"]} == methods
    assert all(point["train_seconds"] > 0 for point in results["points"])
    assert [run["pairs"] for run in results["overoptimisation"]] == [50, 200]


def test_every_model_has_moved_and_none_is_above_the_optimum(results):
    for point in results["points"]:
        assert point["kl"] > 0
        assert point["reward"] <= point["best_reward"] + 1e-6
    (first,) = [one for one in results["expectations"] if one["expected"].startswith("no method")]
    assert first["holds"]


def test_the_pairs_are_of_the_annotator_and_as_many_as_wanted(folder, tmp_path):
    questions = folder / "world" / "prompts.jsonl"
    train = [json.loads(line)["prompt"] for line in questions.read_text().splitlines()]
    held_out = sorted({*all_prompts()} - {*train})
    assert len(held_out) == SMALL.held_out
    world = World(str(folder / "world" / "reference"), str(questions), train, held_out, SMALL)
    with frontier.quiet(tmp_path / "log"):
        path = write_pairs(world, 120, 5, tmp_path)
    margins = []
    for row in map(json.loads, path.read_text().splitlines()):
        assert row["prompt"] in train and all(row["responses"])
        rewards = [hidden_reward(row["prompt"], text) for text in row["responses"]]
        margins += [rewards[better] - rewards[worse] for better, worse in row["pairs"]]
    assert len(margins) == 120
    assert 0.55 < sum(margin > 0 for margin in margins) / 120 < 0.95  # the annotator errs, but not too often


def test_a_training_that_fails_is_named_with_its_log(tmp_path):
    def refuse(world, strength, seed, folder):
        print("half way")
        raise UsageError("no prompts")

    job = frontier.Job(Method("a + b", "beta", refuse), 0.5, 3)
    (tmp_path / "points").mkdir()
    with pytest.raises(UsageError, match=r"a-b-0.5-seed3: no prompts\n.*log.txt; --resume_from_checkpoint"):
        frontier.run_job(job, None, tmp_path)
    assert (tmp_path / "runs" / job.name / "log.txt").read_text() == "half way\n"
    assert not frontier.point_file(tmp_path, job).exists()


def test_a_finished_run_is_left_alone(folder, capsys):
    config = FrontierConfig(output_dir=str(folder), quick=True, resume_from_checkpoint=True)
    assert frontier.run(config) == folder
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists"):
        frontier.run(FrontierConfig(output_dir=str(folder), quick=True))
    with pytest.raises(UsageError, match="seeds: 3 then, 2 now"):
        frontier.run(FrontierConfig(output_dir=str(folder), quick=True, resume_from_checkpoint=True, seeds=2))
    with pytest.raises(UsageError, match="workers must be at least 1"):
        FrontierConfig(workers=0)


def test_a_killed_run_goes_on_to_the_unbroken_result_in_other_processes(folder, results):
    """Points that are there are not computed again; those missing, or half done, are computed by two workers."""
    partial = folder.rename(folder.with_name("out.partial"))
    kept = {path.name: path.stat().st_mtime_ns for path in (partial / "points").iterdir()}
    for name in ("dpo-1-seed1", "reward-model-50-seed1"):
        (partial / "points" / f"{name}.json").unlink()
        del kept[f"{name}.json"]
    (partial / "frontier.json").unlink()
    again = frontier.run(FrontierConfig(output_dir=str(folder), quick=True, workers=2, resume_from_checkpoint=True))
    assert without_times(json.loads((again / "frontier.json").read_text())) == without_times(results)
    assert {name: (again / "points" / name).stat().st_mtime_ns for name in kept} == kept
