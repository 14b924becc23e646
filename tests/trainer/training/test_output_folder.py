"""Output folders: complete or absent, and never replaced unasked."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.config.base import FolderConfig
from rlhf_trainer.config.parse import dump_yaml
from rlhf_trainer.errors import UsageError
from rlhf_trainer.training.output_folder import CONFIG_FILE, check_free, commit_output, open_output, partial_folder


def config(folder, **options):
    return FolderConfig(output_dir=str(folder), **options)


def finished_run(folder, text="first"):
    work = open_output(config(folder))
    (work / "model.txt").write_text(text)
    return commit_output(config(folder))


def test_nothing_is_in_place_before_the_end(tmp_path):
    folder = tmp_path / "deep" / "out"
    work = open_output(config(folder))
    assert work == partial_folder(folder) and work.parent == folder.parent
    assert (work / CONFIG_FILE).read_text() == dump_yaml(config(folder))
    assert not folder.exists()
    assert commit_output(config(folder)) == folder
    assert not work.exists() and (folder / CONFIG_FILE).exists()


def test_an_existing_output_is_kept(tmp_path):
    folder = finished_run(tmp_path / "out")
    with pytest.raises(UsageError, match=r"out exists; .*--overwrite_output_dir"):
        open_output(config(folder))
    assert (folder / "model.txt").read_text() == "first"


@pytest.mark.parametrize("name", ["o" * 250, "ö" * 120, "a\0b", "/"])
def test_a_folder_that_cannot_be_made(name, tmp_path):
    with pytest.raises(UsageError, match="output_dir: expected a folder that can be made"):
        check_free(config(tmp_path / name))


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    assert finished_run(tmp_path / "out").joinpath("model.txt").exists()


def test_overwrite_replaces_at_the_end_only(tmp_path):
    folder = finished_run(tmp_path / "out")
    work = open_output(config(folder, overwrite_output_dir=True))
    assert (folder / "model.txt").read_text() == "first"
    (work / "model.txt").write_text("second")
    commit_output(config(folder, overwrite_output_dir=True))
    assert (folder / "model.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_delete_what_no_run_wrote(tmp_path):
    """A slip like --output_dir ~ --overwrite_output_dir must not cost a home directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"home is not the output of a run .*--overwrite_output_dir leaves it alone"):
        open_output(config(tmp_path / "home", overwrite_output_dir=True))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not the output of a run"):
        check_free(config(tmp_path / "file", overwrite_output_dir=True))
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"


def test_a_run_that_stopped_is_kept_until_overwrite(tmp_path):
    work = open_output(config(tmp_path / "out"))
    (work / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"out.partial is there: .*going on, or stopped"):
        open_output(config(tmp_path / "out"))
    assert (work / "metrics.jsonl").exists()
    open_output(config(tmp_path / "out", overwrite_output_dir=True))
    assert not (work / "metrics.jsonl").exists()


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "out"
    work = open_output(config(folder))
    folder.mkdir()
    (folder / "x").write_text("theirs")
    with pytest.raises(UsageError, match=r"appeared during the run; this run's output is in .*out.partial"):
        commit_output(config(folder))
    assert (folder / "x").read_text() == "theirs" and work.exists()


def test_a_trained_folder_loads_and_resists_a_second_run(model_folder, rows, write_jsonl, train, tmp_path):
    options = {"model_name_or_path": model_folder("gpt2"), "dataset_name": write_jsonl(rows(4)), "max_steps": 1}
    folder, _ = train(**options, output_dir=str(tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"])
    assert not model.transformer.wte.weight.equal(start.transformer.wte.weight)
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids
    kept = {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", CONFIG_FILE} <= set(kept)
    with pytest.raises(UsageError, match=r"run exists; .*--overwrite_output_dir"):
        train(**options, output_dir=str(folder))
    assert kept == {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    train(**options, output_dir=str(folder), overwrite_output_dir=True, seed=3)
    assert (folder / CONFIG_FILE).read_bytes() != kept[CONFIG_FILE]


def test_bad_data_leaves_no_trace(model_folder, write_jsonl, train, tmp_path):
    with pytest.raises(UsageError, match="field 'chosen': the response is empty"):
        train(
            model_name_or_path=model_folder("gpt2"), output_dir=str(tmp_path / "run"),
            dataset_name=write_jsonl([{"prompt": "a", "chosen": "", "rejected": "b"}]),
        )  # fmt: skip
    assert not (tmp_path / "run").exists() and not partial_folder(tmp_path / "run").exists()
