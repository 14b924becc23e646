"""Several processes, over gloo on this machine: the same numbers as one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_trainer.errors import UsageError

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


STAGES = {"sft": 1e-3, "resumed": 1e-3, "reward": 1e-3, "dpo": 1e-4}  # and how near the metrics of both runs must be


def test_two_processes_train_as_one(yaml_config, model_folder, rows, write_jsonl, tmp_path, python):
    """DDP: gradients, those of the head too, are of the whole batch; 3 micro-batches do not divide by 2 processes.

    SFT, packed, whole and resumed; a reward model, whose smallest and largest rewards are of all processes; DPO.
    """
    data = write_jsonl(rows(10), "all.jsonl")
    for name, launch in (("one", ()), ("two", LAUNCH)):
        script = Path(__file__).with_name("all_stages.py")
        words = (str(script), model_folder("llama"), data, yaml_config.name, name)
        done = python(*launch, *words, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == len(STAGES)  # by the main process alone
        records = (tmp_path / name / "reward" / "metrics.jsonl").read_text().splitlines()
        assert done.stdout.count("tracked") == 1 and f"tracked {len(records)} records" in done.stdout
    for stage, rel in STAGES.items():
        one, two = (
            [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
        assert len(one) == len(two) > 3
        losses = [record["loss"] for record in one if "loss" in record]  # step 0 is an evaluation alone
        assert abs(losses[-1] - losses[0]) > 0.05
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"tokens_per_second"}:
                assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-4), (stage, key)
    whole, resumed = (load_file(tmp_path / "two" / stage / "model.safetensors") for stage in ("sft", "resumed"))
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_head_sharded_on_its_own(python):
    """FSDP2: the head's weight is whole inside its own call only, in forward and backward, where it is used."""
    done = python(*LAUNCH, str(Path(__file__).with_name("sharded_head.py")))
    assert done.returncode == 0, done.stderr
    assert "all gradients equal" in done.stdout


def test_what_accelerate_cannot_do_here_is_refused_in_words(train, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", "DEEPSPEED")
    with pytest.raises(UsageError, match="DEEPSPEED: one process, or several by DDP or FSDP2"):
        train(model_name_or_path="m", dataset_name="d")
