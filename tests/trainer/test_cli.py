"""`rlhf` as a user runs it: processes, exit codes, files."""

import json

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import Command, main
from rlhf_trainer.offline.dpo import DPOTask


def test_dpo_from_a_yaml_file_end_to_end(yaml_config, tmp_path, python):
    refused = python("-m", "rlhf_trainer", "dpo", "--config", "run.yaml")
    assert refused.returncode == 2
    assert "row 11, field 'rejected': missing; the row has: prompt, chosen" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()

    done = python("-m", "rlhf_trainer", "dpo", "--config", "run.yaml", "--skip_invalid_rows", "--beta", "0.25")
    assert done.returncode == 0, done.stderr
    assert "1 invalid rows skipped" in done.stdout
    assert done.stderr.count("rlhf-dpo: 100%") >= 1 and "Loading weights" not in done.stderr  # one bar, its own
    output = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(output).chat_template
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    keys = {*DPOTask.names, "grad_norm", "learning_rate", "tokens_per_second", "step", "epoch"}
    assert all(set(record) == keys for record in records)
    assert yaml.safe_load((output / "rlhf_config.yaml").read_text())["beta"] == 0.25

    again = python("-m", "rlhf_trainer", "dpo", "--config", str(output / "rlhf_config.yaml"))
    assert again.returncode == 2 and "--overwrite_output_dir" in again.stderr


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "rlhf COMMAND" in capsys.readouterr().out
    assert main(["dqo"]) == 2
    assert "unknown command 'dqo'" in capsys.readouterr().err


def test_a_wrong_config_is_a_message_not_a_traceback(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("betta: 1\n")
    assert main(["dpo", "--config", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf dpo: ") and "unknown key 'betta'" in error


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "run", interrupted)
    assert main(["grpo"]) == 130
    assert "rlhf grpo: interrupted; the same command with --resume_from_checkpoint goes on" in capsys.readouterr().err
