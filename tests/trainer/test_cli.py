"""`rlhf` as a user runs it: processes, exit codes, files."""

import json

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import PRESETS, main
from rlhf_trainer.commands import COMMANDS, Command
from rlhf_trainer.errors import TrainingError

DPO_METRICS = {
    "loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected",
}  # fmt: skip


def test_a_wrong_flag_ends_the_process_with_2(yaml_config, python):
    refused = python("-m", "rlhf_trainer", "dpo", "--config", "run.yaml", "--betta", "1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("rlhf dpo: unknown flag --betta") and "Traceback" not in refused.stderr


def test_dpo_from_a_yaml_file_end_to_end(yaml_config, tmp_path, python, monkeypatch, capsys):
    """The run in a process of its own, the refusals before and after it in this one, which need not load torch anew."""
    monkeypatch.chdir(tmp_path)
    assert main(["dpo", "--config", "run.yaml"]) == 2
    refused = capsys.readouterr().err
    assert "row 11, field 'rejected': missing; the row has: prompt, chosen" in refused
    assert "Traceback" not in refused
    assert not (tmp_path / "out").exists()

    done = python("-m", "rlhf_trainer", "dpo", "--config", "run.yaml", "--skip_invalid_rows", "--beta", "0.25")
    assert done.returncode == 0, done.stderr
    assert "1 invalid rows skipped" in done.stdout
    assert "\nstep 4/4 loss " in done.stdout and "%|" not in done.stderr  # no bars where there is no terminal
    output = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(output).chat_template
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    keys = {*DPO_METRICS, "grad_norm", "learning_rate", "tokens_per_second", "step", "epoch"}
    assert all(set(record) == keys for record in records)
    assert yaml.safe_load((output / "rlhf_config.yaml").read_text())["beta"] == 0.25

    assert main(["dpo", "--config", str(output / "rlhf_config.yaml")]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "rlhf COMMAND" in capsys.readouterr().out
    assert main(["dqo"]) == 2
    error = capsys.readouterr().err
    assert error == "rlhf: unknown command 'dqo'; did you mean 'dpo'?\n`rlhf --help` lists the commands\n"


@pytest.mark.parametrize(
    ("name", "nearest"), [("reject", "rejection"), ("eval", "evaluate"), ("online_dpo", "online-dpo")]
)
def test_an_unknown_command_answers_with_the_nearest(name, nearest, capsys):
    assert main([name]) == 2
    assert f"unknown command {name!r}; did you mean {nearest!r}?\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_is_where_the_table_says(command):
    assert isinstance(command.load_config(), type) and callable(command.load_function())


def test_a_wrong_flag_is_two_lines(capsys):
    assert main(["dpo", "--dataset", "d.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "rlhf dpo: unknown flag --dataset; did you mean '--dataset_name'?", "`rlhf dpo --help` lists the flags",
    ]  # fmt: skip
    assert main(["dpo"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_run_that_diverges_ends_with_1_and_without_a_traceback(monkeypatch, capsys):
    def diverges(_):
        raise TrainingError("step 3: stopped before the update")

    monkeypatch.setattr(Command, "load_function", lambda _: diverges)
    assert main(["dpo", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]) == 1
    assert capsys.readouterr().err == "rlhf dpo: step 3: stopped before the update\n"


def test_a_wrong_config_is_a_message_not_a_traceback(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("betta: 1\n")
    assert main(["dpo", "--config", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf dpo: ") and "unknown key 'betta'; did you mean 'beta'?" in error
    assert len(error.splitlines()) == 2


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "load_config", interrupted)
    assert main(["grpo"]) == 130
    assert "rlhf grpo: interrupted; the same command with --resume_from_checkpoint goes on" in capsys.readouterr().err


def test_several_processes_are_launched_by_accelerate(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr("os.execv", lambda program, words: calls.append(words[1:]))
    monkeypatch.setattr("rlhf_trainer.cli.run", lambda *_: None)  # an exec does not come back
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert main(["dpo", "--accelerate_config", "fsdp2", "--config", "x.yaml", "--num_processes", "8"]) == 0
    assert main(["sft", "--accelerate_config", str(own)]) == 0
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    preset = str(PRESETS / "fsdp2.yaml")
    assert calls == [
        [*launch, preset, "--num_processes", "8", "-m", "rlhf_trainer", "dpo", "--config", "x.yaml"],
        [*launch, str(own), "-m", "rlhf_trainer", "sft"],
    ]
    assert main(["dpo", "--accelerate_config", "zero3"]) == 2
    assert "expected a file, or one of ddp, fsdp2, fsdp2-offload; got 'zero3'" in capsys.readouterr().err
    assert main(["dpo", "--accelerate_config"]) == 2
    assert "--accelerate_config: expected a value after it" in capsys.readouterr().err


@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.glob("*.yaml")))
def test_presets_are_what_accelerate_reads(preset):
    config = load_config_from_file(str(PRESETS / preset))
    assert str(config.distributed_type).rpartition(".")[2] == ("MULTI_GPU" if preset == "ddp.yaml" else "FSDP")
    if preset != "ddp.yaml":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is (preset == "fsdp2-offload.yaml")
