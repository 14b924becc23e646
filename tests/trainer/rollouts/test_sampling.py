"""`rlhf sample`: prompts times models times completions, and the same file however often the run is killed."""

import datetime
import json
import multiprocessing
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_trainer.data.completions import COMPLETIONS_FILE, row_of
from rlhf_trainer.data.encoding import is_empty
from rlhf_trainer.data.examples import Prompt
from rlhf_trainer.errors import UsageError
from rlhf_trainer.rollouts import sample as sampling
from rlhf_trainer.rollouts.config import SampleConfig
from rlhf_trainer.rollouts.sample import sample
from rlhf_trainer.training.output_folder import CONFIG_FILE, partial_folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / COMPLETIONS_FILE).read_text().splitlines()]


@pytest.fixture
def run(model_folder, rows, write_jsonl, tmp_path):
    """Two models, 5 prompts, 3 completions each: 30 completions in 8 batches."""
    prompts = write_jsonl([{"prompt": row["prompt"]} for row in rows(5)], "prompts.jsonl")

    def run(output="out", **options):
        small = {
            "models": [model_folder("llama"), model_folder("gpt2")], "dataset_name": prompts, "num_completions": 3,
            "max_new_tokens": 6, "per_device_generation_batch_size": 4, "output_dir": str(tmp_path / output),
        }  # fmt: skip
        return sample(SampleConfig(**small | options))

    return run


def test_every_model_writes_completions_of_every_prompt(run, rows, model_folder, capsys):
    folder = run()
    lines = lines_of(folder)
    prompts = [row["prompt"] for row in rows(5)]
    assert [line["model"] for line in lines] == [model_folder("llama")] * 15 + [model_folder("gpt2")] * 15
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(3)] * 2
    assert [line["prompt_row"] for line in lines] == [row for row in (1, 2, 3, 4, 5) for _ in range(3)] * 2
    assert all(isinstance(line["completion"], str) and isinstance(line["finished"], bool) for line in lines)
    assert all(line.keys() == {"prompt", "completion", "model", "prompt_row", "finished"} for line in lines)
    assert len({(line["model"], line["prompt"], line["completion"]) for line in lines}) > 25
    assert sorted(path.name for path in folder.iterdir()) == [COMPLETIONS_FILE, CONFIG_FILE]
    out = capsys.readouterr().out
    cut, empty = sum(not line["finished"] for line in lines), sum(not line["completion"].strip() for line in lines)
    assert f"30 completions of 5 prompts; {cut} did not end within max_new_tokens, {empty} are empty" in out


def test_a_run_is_determined_by_its_configuration(run):
    first = (run("a") / COMPLETIONS_FILE).read_bytes()
    assert (run("b") / COMPLETIONS_FILE).read_bytes() == first
    assert (run("c", seed=1) / COMPLETIONS_FILE).read_bytes() != first


def test_the_same_model_twice_under_two_names_draws_anew(run, model_folder, tmp_path):
    (tmp_path / "other").symlink_to(model_folder("llama"))
    lines = lines_of(run(models=[model_folder("llama"), str(tmp_path / "other")]))
    assert [line["completion"] for line in lines[:15]] != [line["completion"] for line in lines[15:]]


def test_chat_prompts_get_chat_completions_and_answers_travel_along(run, write_jsonl):
    prompt = [{"role": "system", "content": "cats"}, {"role": "user", "content": "the cat ?"}]
    answer = [{"role": "assistant", "content": "ate fish"}]
    data = write_jsonl([{"messages": prompt + answer}, {"messages": prompt[1:] + answer}], "chat.jsonl")
    for line in lines_of(run(dataset_name=data)):
        assert line["prompt"] in (prompt, prompt[1:]) and line["answer"] == answer
        (message,) = line["completion"]
        assert message["role"] == "assistant" and "<|im_end|>" not in message["content"]


def test_the_other_columns_of_a_prompt_travel_with_its_completions(run, tmp_path):
    """A reward function may need them; a date, which JSON does not know, stays behind."""
    day = datetime.date(2024, 5, 6)
    rows = [
        {"prompt": "the cat", "ground_truth": "4", "tests": ["assert f"], "day": day},
        {"prompt": "dogs", "ground_truth": None, "tests": None, "day": day},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = lines_of(run(dataset_name=str(tmp_path / "rows.parquet"), num_completions=1))
    assert [line.get("columns") for line in lines] == [{"ground_truth": "4", "tests": ["assert f"]}, None] * 2


def test_what_the_prompts_end_opened_travels_with_its_completions():
    """`rlhf rejection` reads it in front, as it has no tokenizer to tell it."""
    assert "opening" not in row_of(Prompt(1, "a", [5], None), "model", "b", True)
    assert row_of(Prompt(1, "a", [5], None, text="<think>\n"), "model", "b", True)["opening"] == "<think>\n"


def test_only_the_first_prompts(run):
    assert {line["prompt_row"] for line in lines_of(run(max_prompts=2))} == {1, 2}


def test_an_empty_completion_stays_and_is_counted(run, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "completion_text", lambda *_: " \n")
    lines = lines_of(run())
    assert len(lines) == 30 and {line["completion"] for line in lines} == {" \n"}
    assert "30 are empty" in capsys.readouterr().out


def test_what_is_empty():
    for completion in ("", " \n", [{"role": "assistant", "content": " "}]):
        assert is_empty(completion)
    for completion in ("a", [{"role": "assistant", "content": "a"}], [], [1], None, [{"role": "assistant"}]):
        assert not is_empty(completion)


# --- interruption


def killed(run, call):
    """Runs it in a child that SIGKILL ends at the `call`-th batch."""
    generate, calls = sampling.generate_batch, []

    def generate_or_die(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*args, **options)

    def child():
        sampling.generate_batch = generate_or_die
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("call", [1, 3, 6])  # nothing there yet; within the first model; within the second
def test_a_killed_run_goes_on(run, call, tmp_path, monkeypatch):
    whole = (run("whole") / COMPLETIONS_FILE).read_bytes()
    killed(lambda: run("broken"), call)
    work = partial_folder(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    assert len((work / "progress.jsonl").read_bytes().splitlines()) == 1 + (call - 1)
    with (work / "progress.jsonl").open("a") as file:
        file.write('[["half a li')  # as if it had been killed while it wrote

    numbers, generate = [], sampling.generate_batch
    monkeypatch.setattr(
        sampling, "generate_batch", lambda *a, **options: numbers.append(options["number"]) or generate(*a, **options)
    )
    folder = run("broken", resume_from_checkpoint=True)
    assert (folder / COMPLETIONS_FILE).read_bytes() == whole
    assert numbers == list(range(call - 1, 8))  # what was there is not generated again
    assert not work.exists() and sorted(p.name for p in folder.iterdir()) == [COMPLETIONS_FILE, CONFIG_FILE]


def test_a_run_may_be_killed_again_and_again(run, tmp_path):
    whole = (run("whole") / COMPLETIONS_FILE).read_bytes()
    killed(lambda: run("broken"), 3)
    killed(lambda: run("broken", resume_from_checkpoint=True), 4)
    assert (run("broken", resume_from_checkpoint=True) / COMPLETIONS_FILE).read_bytes() == whole


def test_resuming_with_other_settings_or_data_is_refused(run, rows, write_jsonl, tmp_path):
    killed(lambda: run("broken"), 3)
    with pytest.raises(UsageError, match=r"temperature: 1.0 then, 0.5 now"):
        run("broken", resume_from_checkpoint=True, temperature=0.5)
    with pytest.raises(UsageError, match="Pass --resume_from_checkpoint to go on"):
        run("broken")
    write_jsonl([{"prompt": row["prompt"]} for row in rows(5, seed=9)], "prompts.jsonl")
    with pytest.raises(UsageError, match="the data or a tokenizer is not the one that the run began with"):
        run("broken", resume_from_checkpoint=True)
    assert partial_folder(tmp_path / "broken").exists()


def test_a_finished_run_has_nothing_left_to_do(run, monkeypatch, capsys):
    folder = run(resume_from_checkpoint=True)  # from the start, if there is nothing
    before = (folder / COMPLETIONS_FILE).stat().st_mtime_ns
    monkeypatch.setattr(sampling, "load_codec", None)
    assert run(resume_from_checkpoint=True) == folder
    assert (folder / COMPLETIONS_FILE).stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists; choose another one, or pass --overwrite_output_dir"):
        run()


# --- bad input


def test_a_model_may_not_be_there_twice(run, model_folder):
    with pytest.raises(UsageError, match=r"models: duplicate .*; for more completions raise num_completions"):
        run(models=[model_folder("llama")] * 2)


def test_a_tokenizer_that_is_not_there_shows_before_any_model_writes(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "load_causal_lm", None)
    with pytest.raises(UsageError, match="models: no such folder"):
        run(models=[model_folder("llama"), str(tmp_path / "none")])
    assert not partial_folder(tmp_path / "out").exists()


def test_prompt_and_completion_must_fit_into_the_model(run):
    with pytest.raises(UsageError, match=r"prompts.jsonl, row \d: \d+ tokens, but the model has 96 positions"):
        run(max_new_tokens=95)


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="rlhf sample works in one process and was launched in 2"):
        run()
