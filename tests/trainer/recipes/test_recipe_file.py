"""Recipes as files: their form, and errors that are reported before anything runs, by stage and key."""

from pathlib import Path

import pytest

from rlhf_trainer.cli import main
from rlhf_trainer.errors import UsageError
from rlhf_trainer.recipes.config import RecipeConfig
from rlhf_trainer.recipes.file import check_recipe, config_of, placed, read_recipe, shipped_recipes
from rlhf_trainer.recipes.run import run_recipe

GOOD = """
title: Two stages
variables: {base: /my/base, data: data.jsonl, rate: 1e-3, deep: "${base}/deep"}
stages:
  sft: {command: sft, model_name_or_path: "${base}", dataset_name: "${data}", learning_rate: "${rate}"}
  pick: {python: "shutil:copy", options: {dst: "${sft}/x", follow_symlinks: false}}
  dpo:
    {command: dpo, model_name_or_path: "${sft}", dataset_name: "${pick}/pairs.jsonl", ref_cache_dir: "${output}/cache"}
"""
METHODS = ("sft", "reward", "dpo", "ppo", "grpo", "rejection")
SIX = ("cold_start", "reasoning_prompts", "held_out_prompts", "other_demonstrations", "all_prompts", "preferences")
HAS_TO_BE_SET = {"deepseek_r1": [f"{name}=some/{name}" for name in SIX]}


@pytest.fixture
def recipe(tmp_path):
    """text -> the path of a file that holds it."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_variables_and_stages_are_filled_in(recipe):
    sft, pick, dpo = read_recipe(recipe(GOOD)).stages
    config = config_of(sft, Path("/out"))
    assert (config.model_name_or_path, config.dataset_name, config.learning_rate) == ("/my/base", "data.jsonl", 1e-3)
    assert (config.output_dir, config.resume_from_checkpoint, config.overwrite_output_dir) == ("/out/sft", True, False)
    assert placed(pick, Path("/out")) == {"dst": "/out/sft/x", "follow_symlinks": False}
    config = config_of(dpo, Path("/out"))
    assert (config.model_name_or_path, config.dataset_name) == ("/out/sft", "/out/pick/pairs.jsonl")
    assert config.ref_cache_dir == "/out/cache"


def test_set_changes_variables_and_keys_of_stages(recipe):
    changes = ["base=/other", "rate=2", "dpo.beta=0.5", "dpo.report_to=[tensorboard]", "pick.follow_symlinks=true"]
    sft, pick, dpo = read_recipe(recipe(GOOD), changes).stages
    assert config_of(sft, Path("/out")).model_name_or_path == "/other"
    assert config_of(sft, Path("/out")).learning_rate == 2.0
    assert config_of(dpo, Path("/out")).beta == 0.5 and config_of(dpo, Path("/out")).report_to == ["tensorboard"]
    assert pick.options["follow_symlinks"] is True


def test_what_a_recipe_became_is_a_recipe_that_does_the_same(recipe):
    read = read_recipe(recipe(GOOD), ["rate=2"])
    again = read_recipe(recipe(read.text()))
    assert [stage._replace(where="") for stage in again.stages] == [stage._replace(where="") for stage in read.stages]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "command: sft",
            "command: stf",
            r"mine.yaml, stage sft: unknown command 'stf'; did you mean 'sft'\?; the commands are: sft, reward",
        ),
        ("command: sft", "command: demo", r"stage sft: unknown command 'demo'"),
        ("command: sft", "command: recipe", r"stage sft: unknown command 'recipe'"),
        ("{command: sft", "{python: f, command: sft", r"stage sft: expected either command, .* or python"),
        ("{command: sft,", "{", r"stage sft: expected either command, .* got the keys model_name_or_path"),
        (
            "learning_rate:",
            "learnin_rate:",
            r"stage sft: unknown key 'learnin_rate'; did you mean 'learning_rate'\?\n`rlhf sft --help` lists",
        ),
        ("rate: 1e-3", "rate: fast", r"stage sft: key 'learning_rate': expected float, got str 'fast'"),
        ("rate: 1e-3", "rate: -1", r"stage sft: learning_rate must be at least 0"),
        ("learning_rate:", "output_dir:", r"stage sft: key 'output_dir' is the recipe's: pass --output_dir"),
        ("learning_rate:", "resume_from_checkpoint:", r"stage sft: key 'resume_from_checkpoint' is the recipe's"),
        ('dataset_name: "${data}", ', "", r"stage sft: missing, but needed by sft: dataset_name"),
        ("rate: 1e-3", "rate: null", r"mine.yaml: variable 'rate' has no value: pass --set rate=\.\.\."),
        ("${rate}", "${speed}", r"stage sft: key 'learning_rate': \$\{speed\} is no variable or earlier stage; those"),
        ("${sft}/x", "${dpo}/x", r"stage pick: key 'dst': \$\{dpo\} comes later"),
        ("${sft}/x", "${pick}/x", r"stage pick: key 'dst': \$\{pick\} is this very stage"),
        ("${base}/deep", "${sft}/deep", r"variable deep: \$\{sft\} is no variable"),
        ("  sft:", "  base:", r"'base' cannot name a stage"),
        ("  sft:", "  output:", r"'output' cannot name a stage"),
        ("  sft:", "  a/b:", r"'a/b' cannot name a stage"),
        ("  pick:", "  sft:", r"mine.yaml is not YAML: duplicate key 'sft'"),
        ("title:", "titel:", r"mine.yaml: unknown key 'titel'; the keys are: title, source"),
        ("title:", "threads: many\ntitle:", r"mine.yaml: threads: expected a whole number above 0, got 'many'"),
        ("shutil:copy", "shutil:copie", r"stage pick: python 'shutil:copie': .*has no 'copie'"),
        ("shutil:copy", "no_such_module:f", r"stage pick: python 'no_such_module:f': cannot import"),
        ("dst:", "destination:", r"stage pick: python 'shutil:copy' cannot be called with its options: missing a"),
        ("options:", "option:", r"stage pick: unknown key 'option' beside python; give it as options"),
        ("data.jsonl", "/no/such.jsonl", r"stage sft: key 'dataset_name': no such file or folder: /no/such.jsonl"),
        ("/my/base", "/no/such", r"stage sft: key 'model_name_or_path': no such file or folder: /no/such"),
        (GOOD, "stages: {}", r"mine.yaml: stages: there is none"),
        (GOOD, "stages: [sft]", r"mine.yaml: stages: expected 'key: value' lines, got list"),
        (GOOD, "stages: {sft: sft}", r"stage sft: expected 'key: value' lines, got str 'sft'"),
        (GOOD, "a: [", r"mine.yaml is not YAML"),
        (GOOD, "a: " + "[" * 3000, r"mine.yaml is not YAML: maximum recursion"),
        (GOOD, "threads: " + "1" * 5000, r"mine.yaml is not YAML: Exceeds the limit"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(old, new, message, recipe, tmp_path, monkeypatch):
    assert GOOD.count(old) >= 1
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").touch()
    text = GOOD if old == "/my/base" else GOOD.replace("/my/base", "some/base")
    text = new if old == GOOD else text.replace(old, new)
    with pytest.raises(UsageError, match=message):
        run_recipe(RecipeConfig(recipe=recipe(text), output_dir=str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "mine.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rate", "--set rate: expected name=value"),
        (
            "speed=1",
            r"--set speed=1: .* has no variable 'speed'; its variables are: base, data, rate, deep; .* sft, pick",
        ),
        ("rate=[", r"--set rate=\[: the value is not YAML"),
        ("rate=" + "[" * 3000, r"the value is not YAML: maximum recursion"),
        ("ppo.beta=1", r"no variable 'ppo.beta'"),
        ("sft.betta=1", r"stage sft: unknown key 'betta'\n`rlhf sft --help` lists the keys"),
    ],
)
def test_a_bad_change_is_refused(change, message, recipe):
    with pytest.raises(UsageError, match=message):
        check_recipe(
            read_recipe(recipe(GOOD.replace("/my/base", "m").replace("data.jsonl", "d")), [change]), Path("/o")
        )


def test_a_recipe_that_is_not_there_lists_those_that_are():
    with pytest.raises(UsageError, match=r"recipe zefyr: neither a file nor a recipe that is shipped; .* zephyr, z"):
        read_recipe("zefyr")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_passes_the_check(name):
    recipe = read_recipe(name, HAS_TO_BE_SET.get(name, []))
    check_recipe(recipe, Path("/out"))
    assert recipe.title and recipe.source
    if name in HAS_TO_BE_SET:
        with pytest.raises(UsageError, match=r"variable 'cold_start' has no value"):
            read_recipe(name)


def test_published_recipes_have_their_twins_and_the_dpo_papers_experiments_are_there():
    published = {"instructgpt", "tulu3", "deepseek_r1", "zephyr"}
    twins = {f"{name}-tiny" for name in published}
    assert {*shipped_recipes()} == published | twins | {"dpo_imdb", "dpo_tldr", "dpo_hh"}
    for name in published:  # a twin trains by the same methods, in the same order
        stages, twin = (read_recipe(each, HAS_TO_BE_SET.get(each, [])).stages for each in (name, f"{name}-tiny"))
        methods = [stage.what for stage in twin if stage.what in METHODS]
        assert [stage.what for stage in stages if stage.what in methods][: len(methods)] == methods


def test_a_dry_run_prints_commands_and_leaves_nothing(recipe, tmp_path, capsys):
    path = recipe(GOOD.replace("/my/base", "m").replace("data.jsonl", "d"))
    assert main(["recipe", "--recipe", path, "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    first, sft, pick, dpo = capsys.readouterr().out.splitlines()
    assert first.startswith("# Two stages")
    assert (
        sft == f"rlhf sft --model_name_or_path m --dataset_name d --learning_rate 1e-3 --output_dir {tmp_path}/out/sft"
    )
    assert pick.startswith("# shutil:copy(")
    assert dpo.startswith(
        f"rlhf dpo --model_name_or_path {tmp_path}/out/sft --dataset_name {tmp_path}/out/pick/pairs.jsonl"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_set_may_be_passed_again_and_again(recipe, tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path / "out"), "--dry_run", "--set", "base=m", "data=d", "--set", "rate=2"]
    assert main(["recipe", "--recipe", recipe(GOOD), *argv]) == 0
    assert "--model_name_or_path m --dataset_name d --learning_rate 2 " in capsys.readouterr().out
