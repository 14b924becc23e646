"""Killed at any point and resumed, a run ends as it would have: the same weights and metrics, bit for bit."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline import sft
from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.offline.dpo import train_dpo
from rlhf_trainer.offline.reward_model import train_reward
from rlhf_trainer.offline.sft import train_sft
from rlhf_trainer.training import checkpoint, files, loop, output_folder
from rlhf_trainer.training.output_folder import partial_folder

STAGES = {"sft": (SFTConfig, train_sft), "reward": (RewardConfig, train_reward), "dpo": (DPOConfig, train_dpo)}


@pytest.fixture
def stage(model_folder, rows, write_jsonl, tmp_path):
    """stage(name) -> run(output, **options), of 6 steps with a checkpoint after steps 2 and 4."""
    data = write_jsonl(rows(12))

    def of(name):
        config, train = STAGES[name]
        options = {
            "model_name_or_path": model_folder("llama"), "dataset_name": data, "eval_dataset": data, "eval_steps": 3,
            "batch_size": 4, "micro_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 2,
            "save_steps": 2, "max_length": 96,
        }  # fmt: skip
        options |= {"max_prompt_length": 48} if name != "sft" else {}
        options |= {"ref_cache_dir": str(tmp_path / "cache")} if name == "dpo" else {}
        return lambda output, **more: train(config(output_dir=str(tmp_path / output), **options | more))

    return of


def killed(run, *patches):
    """Runs it in a child that kills itself where a patch says; patches are (module, name, function of the original)."""

    def child():
        for module, name, made in patches:
            setattr(module, name, made(getattr(module, name)))
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, after=False):
    """Dies at the n-th call, before or after it has done its work."""
    calls = []

    def made(original):
        def dying(*args, **options):
            calls.append(1)
            if len(calls) == number and not after:
                kill()
            result = original(*args, **options)
            if len(calls) == number:
                kill()
            return result

        return dying

    return made


def result_of(folder):
    """Weights, and the metrics without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for of_the_clock in ("tokens_per_second", "seconds"):
            record.pop(of_the_clock, None)
    (weights,) = folder.glob("*model.safetensors")  # of the model, or of an adapter
    return load_file(weights), records


def assert_same(a, b):
    (weights, records), (other_weights, other_records) = result_of(a), result_of(b)
    assert records == other_records
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


# In the order of a run: before anything is saved, while the first checkpoint is written, between checkpoints, while
# one is moved, while the second is written, behind the result, and before it is moved into place.
KILLS = {
    "before any checkpoint": (loop, "learning_rate_at", at_call(2)),
    "half a checkpoint": (torch, "save", at_call(1)),
    "a checkpoint not moved": (files, "flush_to_disk", at_call(4)),
    "after a checkpoint": (loop, "save_checkpoint", at_call(1, after=True)),
    "two steps on": (loop, "learning_rate_at", at_call(4)),
    "half the second checkpoint": (torch, "save", at_call(2)),
    "the result written": (sft, "save_result", at_call(1, after=True)),
    "the result not moved": (loop, "commit_output", at_call(1)),
}


@pytest.mark.parametrize("point", KILLS.values(), ids=KILLS)
def test_a_killed_run_goes_on(point, stage, tmp_path):
    run = stage("sft")
    whole = run("whole")
    killed(lambda: run("broken"), point)
    assert not (tmp_path / "broken").exists()
    assert_same(run("broken", resume_from_checkpoint=True), whole)
    assert not partial_folder(tmp_path / "broken").exists()
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("point", ["after a checkpoint", "two steps on", "half the second checkpoint"])
def test_a_run_that_saves_in_the_background_goes_on(point, stage, tmp_path):
    """From a checkpoint, or from the start where none was there yet."""
    run = stage("sft")
    whole = run("whole")
    killed(lambda: run("broken", async_save=True), KILLS[point])
    assert_same(run("broken", resume_from_checkpoint=True, async_save=True), whole)
    assert len(checkpoint.saved_checkpoints(tmp_path / "broken")) == 1


@pytest.mark.parametrize("name", ["reward", "dpo"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw_torch_fused"])
def test_every_stage_goes_on(name, optimizer, stage):
    run = stage(name)
    whole = run("whole", optim=optimizer)
    killed(lambda: run("broken", optim=optimizer), (loop, "learning_rate_at", at_call(6)))
    assert_same(run("broken", optim=optimizer, resume_from_checkpoint=True), whole)


@pytest.mark.parametrize("name", STAGES)
def test_an_adapter_goes_on(name, stage, model_folder, tokenizer, tmp_path):
    """With its dropout; a checkpoint holds the adapter and its optimizer state, and nothing of the base."""
    run, base = stage(name), tmp_path / "base"
    # In bf16 already: a forked child of a process that has used OpenMP cannot convert weights in loading threads.
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"use_peft": True, "lora_dropout": 0.3, "lora_r": 2, "model_name_or_path": str(base)}
    whole = run("whole", **options)
    killed(lambda: run("broken", **options), (loop, "learning_rate_at", at_call(6)))
    newest = checkpoint.newest_checkpoint(partial_folder(tmp_path / "broken"))
    saved = dcp.FileSystemReader(newest.folder).read_metadata().state_dict_metadata
    assert all(
        "lora_" in name or "modules_to_save" in name or "inv_freq" in name
        for name in saved
        if name.startswith("model.")
    )
    assert len(checkpoint.saved_checkpoints(partial_folder(tmp_path / "broken"))) == 2
    assert_same(run("broken", resume_from_checkpoint=True, **options), whole)
    assert (whole / "adapter_config.json").is_file()


def test_a_run_may_be_killed_again_and_again(stage, tmp_path):
    run = stage("sft")
    whole = run("whole")
    killed(lambda: run("broken"), (loop, "learning_rate_at", at_call(4)))
    killed(lambda: run("broken", resume_from_checkpoint=True), (loop, "learning_rate_at", at_call(3)))
    checkpoints = sorted(path.name for path in (partial_folder(tmp_path / "broken") / checkpoint.FOLDER).iterdir())
    assert checkpoints == ["step-000000002", "step-000000004"]
    assert_same(run("broken", resume_from_checkpoint=True), whole)


def damage(folder):
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(folder):
    (folder / ".metadata").write_bytes(b"")


def cut_the_state(folder):
    (folder / checkpoint.STATE).write_text('{"step":')


def other_step(folder):
    """One bit of a digit."""
    text = (folder / checkpoint.STATE).read_text()
    (folder / checkpoint.STATE).write_text(text.replace('"step": 6', '"step": 7'))


def other_fact(folder):
    state = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_text(json.dumps(state | {"metrics_bytes": state["metrics_bytes"] - 1}))


def signed_step_of_another_folder(folder):
    state = json.loads((folder / checkpoint.STATE).read_text()) | {"step": 4}
    del state["checksum"]
    state["checksum"] = checkpoint.checksum(json.dumps(state).encode())
    (folder / checkpoint.STATE).write_text(json.dumps(state))


def no_facts(content):
    def harm(folder):
        (folder / checkpoint.STATE).write_text(content)

    return harm


NO_FACTS = ["null", "[]", '{"checksum": 1}', '{"step": "6", "checksum": ""}', "9" * 5000, "[" * 100_000]


@pytest.mark.parametrize("harm", [other_step, other_fact, signed_step_of_another_folder, *map(no_facts, NO_FACTS)])
def test_a_checkpoint_with_other_facts_is_damaged(harm, tmp_path):
    model = torch.nn.Linear(2, 2)
    for step in (4, 6):
        facts = {"metrics_bytes": 10 * step, "data": "x"}
        checkpoint.save_checkpoint(tmp_path, step, model, torch.optim.SGD(model.parameters()), facts)
    assert checkpoint.newest_checkpoint(tmp_path).step == 6
    harm(tmp_path / checkpoint.FOLDER / "step-000000006")
    with pytest.warns(UserWarning, match="step-000000006 is damaged"):
        newest = checkpoint.newest_checkpoint(tmp_path)
    assert newest.step == newest.state["step"] == 4 and newest.state["metrics_bytes"] == 40


@pytest.mark.parametrize("harm", [damage, truncate, cut_the_state])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(harm, stage, tmp_path):
    run = stage("sft")
    whole = run("whole")
    killed(lambda: run("broken"), (loop, "commit_output", at_call(1)))
    checkpoints = partial_folder(tmp_path / "broken") / checkpoint.FOLDER
    harm(checkpoints / "step-000000006")
    with pytest.warns(UserWarning, match="step-000000006 is damaged; an earlier checkpoint is taken"):
        assert_same(run("broken", resume_from_checkpoint=True), whole)


def test_resume_without_a_run_starts_one_and_of_a_finished_run_does_nothing(stage, capsys, tmp_path):
    run = stage("sft")
    folder = run("out", resume_from_checkpoint=True)
    assert (folder / checkpoint.FOLDER / "step-000000006").is_dir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run("out", resume_from_checkpoint=True) == folder
    assert "already finished" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_run_that_replaces_another_goes_on_too(stage, tmp_path):
    """The same command with --resume_from_checkpoint does it; the old output, of other settings, stays until then."""
    run = stage("sft")
    run("out", seed=3)
    whole = run("whole")
    killed(lambda: run("out", overwrite_output_dir=True), (loop, "learning_rate_at", at_call(4)))
    with pytest.raises(UsageError, match=r"is of another run.*pass --overwrite_output_dir to replace it"):
        run("out", resume_from_checkpoint=True)
    assert_same(run("out", overwrite_output_dir=True, resume_from_checkpoint=True), whole)


def test_two_damaged_checkpoints_do_not_cost_the_new_ones(stage, tmp_path):
    run = stage("sft")
    killed(lambda: run("broken"), (loop, "commit_output", at_call(1)))
    checkpoints = partial_folder(tmp_path / "broken") / checkpoint.FOLDER
    for folder in checkpoints.iterdir():
        damage(folder)
    killed(lambda: run("broken", resume_from_checkpoint=True), (loop, "learning_rate_at", at_call(4)))
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000002"]


def test_two_processes_do_not_work_in_one_folder(stage):
    """The second is refused; the first is not disturbed."""
    run = stage("sft")
    context = multiprocessing.get_context("fork")
    working, go_on = context.Event(), context.Event()

    def child():
        original = loop.learning_rate_at

        def waiting(*args):
            working.set()
            assert go_on.wait(60)
            return original(*args)

        loop.learning_rate_at = waiting
        run("out")

    process = context.Process(target=child)
    process.start()
    assert working.wait(60)
    for options in ({"resume_from_checkpoint": True}, {"overwrite_output_dir": True}):
        with pytest.raises(UsageError, match="another process is working in"):
            run("out", **options)
    go_on.set()
    process.join(60)
    assert process.exitcode == 0


def test_lost_metrics_are_reported(stage, tmp_path):
    run = stage("sft")
    killed(lambda: run("broken"), (loop, "learning_rate_at", at_call(4)))
    (partial_folder(tmp_path / "broken") / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="metrics.jsonl has lost lines"):
        _, records = result_of(run("broken", resume_from_checkpoint=True))
    assert [record["step"] for record in records] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "options", [{}, {"async_save": True}, {"async_save": True, "max_steps": 3, "save_only_model": True}]
)
def test_a_full_disk_is_reported(options, stage, monkeypatch, tmp_path):
    """In the background at the next checkpoint, or at the end."""

    def fill(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fill)
    with pytest.raises(UsageError, match=r"(?s)the checkpoint of step 2 cannot be saved .*No space left"):
        stage("sft")("out", **options)
    assert not (tmp_path / "out").exists()


def test_another_model_behind_the_same_name_is_reported(stage, model_folder, make_model, tokenizer, tmp_path):
    run, start = stage("dpo"), tmp_path / "start"
    shutil.copytree(model_folder("llama"), start)
    options = {"model_name_or_path": str(start)}
    killed(lambda: run("broken", **options), (loop, "learning_rate_at", at_call(4)))
    make_model("llama", seed=5).save_pretrained(start)
    with pytest.raises(UsageError, match="a reference model"):
        run("broken", resume_from_checkpoint=True, **options)
    make_model("gpt2").save_pretrained(start)
    with pytest.raises(UsageError, match=r"a reference model|of another model"):
        run("broken", resume_from_checkpoint=True, **options)


def test_a_run_killed_behind_its_end_is_finished(stage, tmp_path):
    run, checkpoints = stage("sft"), tmp_path / "out" / checkpoint.FOLDER
    killed(lambda: run("out"), (loop, "keep_checkpoints", at_call(1)))
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000000004", "step-000000006"]
    run("out", resume_from_checkpoint=True)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000006"]
    run("out", resume_from_checkpoint=True, save_only_model=True)
    assert not checkpoints.exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_run_goes_on_to_be_longer(name, stage, tmp_path, capsys):
    """It ends as the unbroken longer run, whether by epochs or steps, also where it is killed on its way."""
    run = stage(name)
    options = {"lr_scheduler_type": "constant_with_warmup", "eval_steps": 1}
    whole = run("whole", **options, num_train_epochs=4)
    run("out", **options, num_train_epochs=1)
    killed(
        lambda: run("out", **options, num_train_epochs=4, resume_from_checkpoint=True),
        (loop, "learning_rate_at", at_call(4)),
    )
    assert partial_folder(tmp_path / "out").exists() and not (tmp_path / "out").exists()
    run("out", **options, max_steps=8, resume_from_checkpoint=True)
    assert "note: the learning rate" not in capsys.readouterr().out
    assert_same(run("out", **options, max_steps=12, resume_from_checkpoint=True), whole)
    assert "resumed from step 8" in capsys.readouterr().out


def test_a_longer_run_says_where_its_learning_rate_leaves_the_unbroken_one(stage, capsys):
    run = stage("sft")
    run("out", max_steps=2, lr_scheduler_type="cosine", warmup_steps=0)
    run("out", max_steps=4, lr_scheduler_type="cosine", warmup_steps=0, resume_from_checkpoint=True)
    assert "that of a run of 2 steps until here, and is now that of a run of 4" in capsys.readouterr().out


def test_a_finished_run_without_state_is_a_model_to_start_from(stage, tmp_path):
    run = stage("sft")
    run("out", save_only_model=True)
    assert not (tmp_path / "out" / checkpoint.FOLDER).exists()
    with pytest.raises(UsageError, match=r"no optimizer state \(save_only_model\).*--model_name_or_path .*out"):
        run("out", num_train_epochs=4, resume_from_checkpoint=True)


def test_a_run_does_not_go_back(stage, tmp_path):
    run = stage("sft")
    run("out")
    with pytest.raises(UsageError, match="has trained for 6 steps already: raise num_train_epochs or max_steps"):
        run("out", max_steps=5, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=r"is of another run, .*seed: 42 then, 1 now"):
        run("out", max_steps=9, seed=1, resume_from_checkpoint=True)
    assert (tmp_path / "out").exists() and not partial_folder(tmp_path / "out").exists()
    killed(lambda: run("broken"), (loop, "learning_rate_at", at_call(6)))
    with pytest.raises(UsageError, match="has trained for 4 steps already"):
        run("broken", max_steps=3, save_steps=1, resume_from_checkpoint=True)


def test_a_run_killed_before_it_has_a_folder_leaves_none_that_cannot_be_resumed(stage, tmp_path):
    run = stage("sft")
    killed(lambda: run("out"), (output_folder.Path, "write_text", at_call(1)))
    assert not partial_folder(tmp_path / "out").exists()
    run("out", resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.jsonl"]


def test_resume_takes_the_run_it_was(stage, tmp_path, rows):
    run = stage("sft")
    killed(lambda: run("broken"), (loop, "learning_rate_at", at_call(4)))
    with pytest.raises(UsageError, match=r"is of another run, .*learning_rate: 0.001 then, 0.01 now"):
        run("broken", learning_rate=1e-2, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=r"Pass --resume_from_checkpoint to go on with it"):
        run("broken")
    data = Path(tmp_path / "train.jsonl")
    shutil.copy(data, tmp_path / "kept.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12, seed=1)))
    with pytest.raises(UsageError, match="the data set, the tokenizer, a reference model or, where"):
        run("broken", resume_from_checkpoint=True)
    shutil.copy(tmp_path / "kept.jsonl", data)
    run("broken", resume_from_checkpoint=True, save_steps=1)
