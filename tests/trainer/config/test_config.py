"""YAML and flags: both work, flags win, and nothing wrong passes."""

import dataclasses

import pytest

from rlhf_trainer.commands import COMMANDS
from rlhf_trainer.config.base import SUBJECTS, names_with
from rlhf_trainer.config.parse import COUNTERPARTS, dump_yaml, parse_config
from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.studies.config import DemoConfig

REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", "o"]


def parse(*argv, cls=DPOConfig):
    return parse_config(cls, argv, "rlhf test", "")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, required=True):
        path = tmp_path / "run.yaml"
        path.write_text(("model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\n" if required else "") + text)
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
    """--config reads the file that dump_yaml writes; and each of its keys is a flag."""
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
        ("betta: 0.1\n", r"run.yaml: unknown key 'betta'; did you mean 'beta'\?\n`rlhf test --help` lists the keys$"),
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
        (
            "loss_type: sigmod\n",
            r"run.yaml: key 'loss_type': expected one of sigmoid, hinge, .*; got 'sigmod'; did you mean 'sigmoid'\?",
        ),
        ("beta: [unclosed\n", r"run.yaml is not YAML"),
        ("beta: " + "[" * 3000 + "]" * 3000 + "\n", r"run.yaml is not YAML: .*recursion"),
        ("beta: " + "1" * 5000 + "\n", r"run.yaml is not YAML: .*digits"),
        ("beta: " + "1" * 400 + "\n", r"run.yaml: key 'beta': expected float, got int 1111"),
        ("max_steps: " + "1" * 400 + "\n", r"max_steps must be below 2\*\*63, got 1111"),
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
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UsageError, match=r"File name too long|null byte"):
            parse("--config", name)
    with pytest.raises(UsageError, match="--config needs a file name"):
        parse("--config")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--betta", "1"], "unknown flag --betta; did you mean '--beta'?"),
        (["--lr", "1"], "unknown flag --lr; did you mean '--learning_rate'?"),
        (["--bet", "1"], "unknown flag --bet; did you mean '--beta'?"),  # not taken: a new flag may begin like that
        (["--beta", "high"], "argument --beta: invalid float value: 'high'"),
        (
            ["--loss_type", "sigmod"],
            "argument --loss_type: expected one of sigmoid, hinge, ipo, ipo_mean, robust, simpo, apo_zero, apo_down, "
            "sppo, nca, exo, aot, discopop; got 'sigmod'; did you mean 'sigmoid'?",
        ),
        (["stray"], "unrecognized arguments: stray"),
        (["--beta"], "argument --beta: expected one argument"),
        (["--bf16=maybe"], "argument --bf16: expected true or false, got 'maybe'"),
    ],
)
def test_wrong_flags_end_with_a_message_of_two_lines(argv, message, capsys):
    with pytest.raises(UsageError) as error:
        parse(*REQUIRED, *argv)
    first, second = str(error.value).splitlines()
    assert first.startswith(message)
    assert second == "`rlhf test --help` lists the flags"
    assert capsys.readouterr() == ("", "")


OLD_NAMES = {
    "dataset": "dataset_name", "dataset_train": "dataset_train_split", "chat_template": "chat_template_path",
    "optimizer": "optim", "overwrite": "overwrite_output_dir", "resume": "resume_from_checkpoint",
    "lr_schedule": "lr_scheduler_type", "streaming": "dataset_streaming", "assistant_turns": "assistant_only_loss",
    "packed": "packing", "train_batch_size": "batch_size",
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_unknown_name_answers_with_the_nearest(name, yaml_file):
    with pytest.raises(UsageError, match=rf"^unknown flag --{name}; did you mean '--{OLD_NAMES[name]}'\?\n"):
        parse(*REQUIRED, f"--{name}", "x", cls=SFTConfig)
    with pytest.raises(UsageError, match=rf"run.yaml: unknown key '{name}'; did you mean '{OLD_NAMES[name]}'\?\n"):
        parse("--config", yaml_file(f"{name}: x\n"), cls=SFTConfig)


def test_a_name_that_is_near_none(yaml_file):
    for name in ("quux", "zzz"):
        with pytest.raises(UsageError, match=rf"^unknown flag --{name}\n`rlhf test --help` lists the flags$"):
            parse(*REQUIRED, f"--{name}", "1")
        with pytest.raises(UsageError, match=rf"run.yaml: unknown key '{name}'\n`rlhf test --help` lists the keys$"):
            parse("--config", yaml_file(f"{name}: x\n"))
    with pytest.raises(UsageError, match=r"run.yaml: unknown key 3\n`rlhf test --help` lists the keys$"):
        parse("--config", yaml_file("3: x\n"))


@pytest.mark.parametrize(
    ("name", "ours"),
    [("precision", "bf16"), ("simpo_gamma", "gamma_beta_ratio"), ("gradient_accumulation_steps", "batch_size")],
)
def test_names_of_other_trainers_are_answered_with_ours(name, ours, yaml_file):
    with pytest.raises(UsageError, match=f"unknown flag --{name}; did you mean '--{ours}'"):
        parse(*REQUIRED, f"--{name}", "1")
    with pytest.raises(UsageError, match=f"unknown key '{name}'; did you mean '{ours}'"):
        parse("--config", yaml_file(f"{name}: x\n"))


def test_every_counterpart_is_an_option_of_some_command():
    known = {field.name for command in COMMANDS.values() for field in dataclasses.fields(command.load_config())}
    assert set(COUNTERPARTS.values()) <= known


def test_a_duplicate_key_is_refused(yaml_file):
    with pytest.raises(UsageError, match=r"run.yaml is not YAML: duplicate key 'beta'"):
        parse("--config", yaml_file("beta: 0.1\nbeta: 0.2\n"))


def test_help_marks_what_is_required_and_says_defaults_of_zero(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "A .jsonl, .json, .csv or .parquet file, or a hub id. (required)" in text
    assert "added to the gradient for rmsprop. (default: 0.0)" in text


def test_required_keys_are_asked_for(yaml_file):
    with pytest.raises(UsageError) as error:
        parse("--config", yaml_file("model_name_or_path: m\noutput_dir: o\n", required=False))
    required = str(error.value).split("required:")[1]
    assert "--dataset_name" in required and "--output_dir" not in required


def test_help_groups_the_flags_by_subject(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    flags = {}
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            heading = line[:-1]
        elif line.startswith("  --"):
            flags.setdefault(heading, []).append(line.split()[0])
    assert list(flags) == ["options", "models", "adapters (LoRA)", "data", "loss", "optimization", "output"]
    assert flags["loss"] == ["--beta", "--loss_type", "--label_smoothing", "--gamma_beta_ratio"]
    assert flags["models"][0] == "--model_name_or_path" and "--dataset_name" in flags["data"]
    assert "--learning_rate" in flags["optimization"] and flags["output"][0] == "--output_dir"
    assert sum(map(len, flags.values())) == len(dataclasses.fields(DPOConfig)) + 1  # and --config


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_has_a_heading_and_a_help(command):
    for field in dataclasses.fields(command.load_config()):
        assert field.metadata["help"].endswith("."), field.name
        assert field.metadata["subject"] in [subject.title for subject in SUBJECTS], field.name


def test_options_that_a_resumed_run_may_change():
    assert set(names_with(DPOConfig, "may_change")) == {
        "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "report_to", "project", "logging_steps",
        "save_only_model", "num_train_epochs", "max_steps", "dry_run", "dry_run_processes", "push_to_hub",
        "hub_model_id", "hub_private_repo", "async_save",
    }  # fmt: skip
    assert set(names_with(RewardConfig, "may_change")) == {*names_with(DPOConfig, "may_change"), "compare_with"}


def test_options_that_name_input():
    assert set(names_with(DPOConfig, "names_input")) == {
        "model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset", "ref_model_name_or_path",
    }  # fmt: skip


def test_a_constant_rate_has_no_warm_up():
    """As in transformers; this trainer's default is constant_with_warmup."""
    sft = [*REQUIRED, "--lr_scheduler_type", "constant"]
    assert parse(*sft, cls=SFTConfig).lr_scheduler_type == "constant"
    message = "lr_scheduler_type constant has no warm-up: pass warmup_steps 0, not 3, or .* constant_with_warmup"
    with pytest.raises(UsageError, match=message):
        parse(*sft, "--warmup_steps", "3", cls=SFTConfig)
    assert parse(*REQUIRED, cls=DPOConfig).lr_scheduler_type == "constant_with_warmup"


def test_last_turn_only_is_for_the_assistants_messages():
    with pytest.raises(UsageError, match="last_turn_only learns the assistant's last message: leave assistant_only_"):
        parse(*REQUIRED, "--last_turn_only", "--no_assistant_only_loss", cls=SFTConfig)
    config = parse(*REQUIRED, "--no_assistant_only_loss", cls=SFTConfig)
    assert (config.assistant_only_loss, config.last_turn_only) == (False, False)


def test_demo_config_has_defaults_for_everything():
    assert parse(cls=DemoConfig) == DemoConfig()
    assert parse("--output_dir", "x", cls=DemoConfig).output_dir == "x"
