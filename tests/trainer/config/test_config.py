"""YAML and flags: both work, flags win, and nothing wrong passes."""

import dataclasses

import pytest

from rlhf_trainer.config.parse import dump_yaml, parse_config
from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.studies.config import DemoConfig

REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", "o"]


def parse(*argv, cls=DPOConfig):
    return parse_config(cls, argv, "rlhf test", "")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, required=True):
        path = tmp_path / "run.yaml"
        path.write_text(("model_name_or_path: m\ndataset: d.jsonl\noutput_dir: o\n" if required else "") + text)
        return str(path)

    return write


def test_flags_alone():
    config = parse(*REQUIRED, "--beta", "0.3", "--report_to", "wandb", "trackio", "--skip-invalid-rows")
    assert (config.beta, config.report_to, config.skip_invalid_rows) == (0.3, ["wandb", "trackio"], True)
    assert config.batch_size == 64


def test_yaml_alone_and_flags_over_yaml(yaml_file):
    path = yaml_file("beta: 0.2\nbatch_size: 16\ngradient_checkpointing: true\nmax_steps: null\n")
    assert parse("--config", path) == DPOConfig(
        model_name_or_path="m",
        dataset_name="d.jsonl",
        output_dir="o",
        beta=0.2,
        batch_size=16,
        gradient_checkpointing=True,
    )
    config = parse(
        f"--config={path}", "--beta", "0.5", "--output_dir", "elsewhere", "--gradient_checkpointing", "false"
    )
    assert (config.beta, config.batch_size, config.output_dir) == (0.5, 16, "elsewhere")
    assert config.gradient_checkpointing is False


def test_every_key_of_the_yaml_file_is_a_flag(yaml_file, capsys):
    """What dump_yaml writes, --config reads; and each of its keys is a flag."""
    config = DPOConfig(
        model_name_or_path="m",
        dataset_name="d",
        output_dir="o",
        beta=0.3,
        report_to=["wandb"],
        eval_dataset="e",
        max_steps=7,
    )
    path = yaml_file(dump_yaml(config), required=False)
    assert parse("--config", path) == config
    with pytest.raises(SystemExit):
        parse("--help")
    flags = capsys.readouterr().out
    assert all(f"--{name}" in flags for name in dataclasses.asdict(config))


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_numbers_as_people_write_them(text, yaml_file):
    """YAML 1.1 takes 1e-6 for text."""
    assert parse("--config", yaml_file(f"learning_rate: {text}\n")).learning_rate == 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1\n", r"run.yaml: unknown key 'betta'; the keys are: output_dir, .*beta"),
        ("beta: high\n", r"run.yaml: key 'beta': expected float, got str 'high'"),
        ("beta: true\n", r"run.yaml: key 'beta': expected float, got bool True"),
        ("batch_size: 6.5\n", r"run.yaml: key 'batch_size': expected int, got float 6.5"),
        ("batch_size: true\n", r"run.yaml: key 'batch_size': expected int, got bool True"),
        ("batch_size: null\n", r"run.yaml: key 'batch_size': expected int, got NoneType None"),
        ("max_steps: many\n", r"run.yaml: key 'max_steps': expected int, got str 'many'"),
        ("gradient_checkpointing: 1\n", r"run.yaml: key 'gradient_checkpointing': expected bool, got int 1"),
        ("eval_dataset: 3\n", r"run.yaml: key 'eval_dataset': expected str, got int 3"),
        ("report_to: wandb\n", r"run.yaml: key 'report_to': expected a list of str, got str 'wandb'"),
        ("report_to: [3]\n", r"run.yaml: key 'report_to': expected str, got int 3"),
        ("loss_type: sigmod\n", r"run.yaml: key 'loss_type': expected one of sigmoid, hinge, .*; got 'sigmod'"),
        ("beta: [unclosed\n", r"run.yaml is not YAML"),
        ("beta: -1\n", r"beta must be at least 0, got -1"),
        ("beta: .nan\n", r"beta must be at least 0, got nan"),
        ("batch_size: 0\n", r"batch_size must be at least 1, got 0"),
        ("max_length: 512\n", r"max_length must .*exceed max_prompt_length=512, got 512"),
    ],
)
def test_wrong_yaml_names_file_and_key(text, message, yaml_file):
    with pytest.raises(UsageError, match=message):
        parse("--config", yaml_file(text))


def test_a_file_that_is_no_mapping_or_not_there(yaml_file, tmp_path):
    with pytest.raises(UsageError, match=r"must hold 'key: value' lines, got list"):
        parse("--config", yaml_file("- beta\n", required=False))
    with pytest.raises(UsageError, match=r"--config .*none.yaml: No such file"):
        parse("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match="--config needs a file name"):
        parse("--config")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--betta", "1"], "unrecognized arguments: --betta"),
        (["--bet", "1"], "unrecognized arguments: --bet"),  # no abbreviations: they break when a flag is added
        (["--beta", "high"], "argument --beta: invalid float value: 'high'"),
        (["--loss_type", "sigmod"], "argument --loss_type"),
    ],
)
def test_wrong_flags_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*REQUIRED, *argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_required_keys_are_asked_for(capsys, yaml_file):
    with pytest.raises(SystemExit):
        parse("--config", yaml_file("model_name_or_path: m\noutput_dir: o\n", required=False))
    message = capsys.readouterr().err
    required = message.split("required:")[1]
    assert "--dataset_name" in required and "--output_dir" not in required


def test_demo_config_has_defaults_for_everything():
    assert parse(cls=DemoConfig) == DemoConfig()
    assert parse("--output_dir", "x", cls=DemoConfig).output_dir == "x"
