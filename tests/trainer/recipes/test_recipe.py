"""`rlhf recipe`: stages feed each other, killed anywhere it goes on to the unbroken result; one report tells all."""

import json

import pytest
import yaml

from rlhf_trainer.errors import TrainingError, UsageError
from rlhf_trainer.recipes import run as recipe
from rlhf_trainer.recipes.config import RecipeConfig
from rlhf_trainer.recipes.run import run_recipe
from rlhf_trainer.training import loop as training
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder
from tests.trainer.training.test_resume import assert_same, at_call, killed

FUNCTIONS = """
import json, shutil
from pathlib import Path

def halve(folder, *, source, kept=0.5, fail=False):
    if fail:
        raise RuntimeError("out of luck")
    lines = Path(source).read_text().splitlines(keepends=True)
    assert not list(folder.glob("*.jsonl")), "a function starts anew"
    (folder / "half.jsonl").write_text("".join(lines[: int(len(lines) * kept)]))
    (folder / "report.json").write_text(json.dumps({"kept": kept, "from": source}))
"""


@pytest.fixture(scope="module")
def three(model_folder, rows, tmp_path_factory):
    """A recipe of SFT in 6 steps, a function, and DPO in 2; its data, train.jsonl, lie beside it."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "steps_of_mine.py").write_text(FUNCTIONS)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    small = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0.5, "max_length": 96}
    stages = {
        "sft": {
            "command": "sft", "model_name_or_path": "${base}", "dataset_name": "${data}", **small,
            "num_train_epochs": 2, "save_steps": 2,
        },
        "half": {"python": "steps_of_mine:halve", "options": {"source": "${data}"}},
        "dpo": {
            "command": "dpo", "model_name_or_path": "${sft}", "dataset_name": "${half}/half.jsonl", **small,
            "eval_dataset": "${data}", "max_prompt_length": 48, "ref_cache_dir": "${output}/cache",
        },
    }  # fmt: skip
    variables = {"base": model_folder("llama"), "data": str(folder / "train.jsonl")}
    content = {"title": "Three", "source": "a paper", "variables": variables, "stages": stages}
    (folder / "three.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "three.yaml"


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
    """The unbroken run."""
    return run_recipe(RecipeConfig(recipe=str(three), output_dir=str(tmp_path_factory.mktemp("whole") / "out")))


@pytest.fixture
def run(three, tmp_path):
    def run(output="out", **options):
        return run_recipe(RecipeConfig(**{"recipe": str(three), "output_dir": str(tmp_path / output)} | options))

    return run


def report_of(folder):
    """Without what depends on the clock, on where a run was killed, and on its folder's name."""
    text = (folder / "report.json").read_text().replace(str(folder), "OUT")
    report = json.loads(text)
    for part in (report, *report["stages"]):
        part.pop("seconds")
        part.pop("resumed", None)
    return report


def test_the_report_tells_what_each_stage_consumed_and_left(run, three, capsys):
    folder = run()
    sft, half, dpo = json.loads((folder / "report.json").read_text())["stages"]
    data = {"from": str(three.with_name("train.jsonl")), "rows": 12}
    assert sft["consumed"]["dataset_name"] == data and sft["steps"] == 6
    assert sft["metrics"]["loss"]["last"] < sft["metrics"]["loss"]["first"]
    assert half["rows"] == {"half.jsonl": 6} and half["report"]["kept"] == 0.5
    assert dpo["consumed"] == {
        "model_name_or_path": {"from": "sft"}, "dataset_name": {"from": "half/half.jsonl", "rows": 6},
        "eval_dataset": data,
    }  # fmt: skip
    assert dpo["steps"] == 2 and {"eval/loss", "loss"} <= dpo["metrics"].keys()
    assert all(stage["seconds"] > 0 and stage["resumed"] is False for stage in (sft, dpo))
    text = (folder / "report.md").read_text()
    assert "# Three\n\nAfter a paper.\n" in text and "half/half.jsonl (6 rows)" in text and "- kept: 0.5" in text
    assert text in capsys.readouterr().out
    assert ".partial" not in text + (folder / "report.json").read_text()


def test_configurations_of_stages_hold_when_all_is_in_place(run, whole):
    folder = whole
    dpo, half = (yaml.safe_load((folder / name / CONFIG_FILE).read_text()) for name in ("dpo", "half"))
    assert dpo["model_name_or_path"] == str(folder / "sft") and dpo["output_dir"] == str(folder / "dpo")
    assert dpo["dataset_name"] == str(folder / "half" / "half.jsonl")
    assert half["python"] == "steps_of_mine:halve" and half["output_dir"] == str(folder / "half")
    assert half["options"] == {"source": dpo["eval_dataset"]}
    assert all(".partial" not in path.read_text() for path in folder.rglob("*.yaml"))
    assert (folder / "cache").is_dir()
    again = run("again", recipe=str(folder / "recipe.yaml"))  # the recipe as it was run needs no variables
    assert_same(again / "dpo", folder / "dpo")


# At each boundary of stages, inside a stage that trains, inside a function's, and while all is brought to its end.
KILLS = {
    "before the first stage": (recipe, "run_stage", at_call(1)),
    "inside the first stage": (training, "learning_rate_at", at_call(4)),
    "the first stage not noted": (recipe, "run_stage", at_call(1, after=True)),
    "before the second stage": (recipe, "run_stage", at_call(2)),
    "a function not called": (recipe, "function_of", at_call(1)),
    "a function's folder not moved": (recipe, "commit_output", at_call(1)),
    "before the third stage": (recipe, "run_stage", at_call(3)),
    "inside the third stage": (training, "learning_rate_at", at_call(8)),
    "the last stage not noted": (recipe, "run_stage", at_call(3, after=True)),
    "before the report": (recipe, "report_of", at_call(1)),
    "half the configurations renamed": (recipe, "write_whole", at_call(8)),
    "all done and not moved": (recipe, "commit_output", at_call(2)),
}


@pytest.mark.parametrize("point", KILLS.values(), ids=KILLS)
def test_killed_anywhere_it_goes_on(point, run, whole, tmp_path):
    killed(lambda: run("out"), point)
    assert not (tmp_path / "out").exists()
    folder = run("out", resume_from_checkpoint=True)
    for stage in ("sft", "dpo"):
        assert_same(folder / stage, whole / stage)
    assert report_of(folder) == report_of(whole)
    assert not partial_folder(folder).exists()
    files = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in (folder, whole)]
    assert files[0] == files[1]


def test_resume_of_a_finished_recipe_does_nothing(run, capsys):
    folder = run()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(resume_from_checkpoint=True) == folder
    assert "already finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UsageError, match=r"exists; choose another one, or pass --overwrite_output_dir"):
        run()
    with pytest.raises(UsageError, match=r"of another recipe, .*stage sft: num_train_epochs: 2 then, 1 now"):
        run(resume_from_checkpoint=True, set=["sft.num_train_epochs=1"])


def test_stages_to_come_may_be_changed_and_those_begun_may_not(run, tmp_path):
    killed(lambda: run(), (recipe, "run_stage", at_call(3)))
    with pytest.raises(
        UsageError, match=r"of another recipe, .*\(stage half: options: .* Only stages that have not begun"
    ):
        run(resume_from_checkpoint=True, set=["half.kept=0.25"])
    folder = run(resume_from_checkpoint=True, set=["dpo.max_steps=1"])
    assert len((folder / "dpo" / "metrics.jsonl").read_text().splitlines()) == 2  # before training, and its step


def test_stages_that_were_done_may_not_vanish(run, three, tmp_path):
    killed(lambda: run(), (recipe, "run_stage", at_call(2)))
    content = yaml.safe_load(three.read_text())
    content["stages"] = {"half": content["stages"]["half"]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UsageError, match=r"it began with the stages sft, the recipe now has half"):
        run(recipe=str(tmp_path / "one.yaml"), resume_from_checkpoint=True)


def test_a_stage_that_fails_is_named_and_mended_goes_on(run, whole, tmp_path):
    with pytest.raises(
        UsageError, match=r"(?s)three.yaml, stage dpo: .*over max_prompt_length=1\n.*--resume_from_checkpoint"
    ) as error:
        run(set=["dpo.max_prompt_length=1"])
    assert str(partial_folder(tmp_path / "out")) in str(error.value)
    folder = run(resume_from_checkpoint=True, set=["dpo.max_prompt_length=48"])
    assert_same(folder / "dpo", whole / "dpo")


def test_a_training_that_diverges_is_reported_with_its_stage(run, tmp_path):
    with pytest.raises(
        TrainingError, match=r"(?s)three.yaml, stage sft: step \d.*What is done is kept in .*--resume_from_checkpoint"
    ):
        run(set=["sft.learning_rate=1e30", "sft.warmup_steps=0"])
    assert (partial_folder(tmp_path / "out") / "sft.partial").is_dir()


def test_a_function_that_raises_is_named_with_its_own_traceback(run, tmp_path):
    with pytest.raises(RuntimeError, match="out of luck") as error:
        run(set=["half.fail=true"])
    assert any("stage half: steps_of_mine:halve raised this" in note for note in error.value.__notes__)
    assert (partial_folder(tmp_path / "out") / "sft" / "model.safetensors").exists()


def test_overwrite_replaces_at_the_end_only(run, tmp_path):
    folder = run()
    with pytest.raises(UsageError, match="stage dpo"):
        run(overwrite_output_dir=True, set=["dpo.max_prompt_length=1"])
    assert (folder / "report.md").exists()
    replaced = run(overwrite_output_dir=True, set=["dpo.max_steps=1"])
    assert replaced == folder and json.loads((folder / "report.json").read_text())["stages"][2]["steps"] == 1


def test_threads_are_those_of_the_recipe(run, three, tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(recipe.torch, "set_num_threads", threads.append)
    path = tmp_path / "threads.yaml"
    path.write_text("threads: 1\n" + three.read_text())
    run(recipe=str(path), set=["sft.max_steps=1", "dpo.max_steps=1"])
    assert threads == [1]


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="rlhf recipe works in one process and was launched in 2"):
        run()
