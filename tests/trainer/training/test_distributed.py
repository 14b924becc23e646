"""Several processes, over gloo on this machine: the same numbers as one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_trainer.errors import UsageError

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_train_as_one(yaml_config, tmp_path, python):
    """DDP: gradients, those of the head too, are of the whole batch; 3 micro-batches do not divide by 2 processes."""
    run = ("-m", "rlhf_trainer", "dpo", "--config", "run.yaml", "--skip_invalid_rows")
    for name, launch in (("one", ()), ("two", LAUNCH)):
        folders = ("--output_dir", name, "--ref_cache_dir", f"cache-{name}")  # each computes its own reference
        done = python(*launch, *run, *folders, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == 1  # by the main process alone
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    assert abs(one[-1]["loss"] - one[0]["loss"]) > 0.05
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"loss", "rewards/margins", "logps/chosen", "grad_norm"}
        for key in a.keys() - {"tokens_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key


def test_the_other_stages_in_two_processes(model_folder, rows, write_jsonl, tmp_path, python):
    """SFT, packed, whole and resumed; a reward model, whose smallest and largest rewards are of all processes."""
    data = write_jsonl(rows(10))
    for name, launch in (("one", ()), ("two", LAUNCH)):
        script = Path(__file__).with_name("other_stages.py")
        done = python(*launch, str(script), model_folder("llama"), data, name, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        records = (tmp_path / name / "reward" / "metrics.jsonl").read_text().splitlines()
        assert done.stdout.count("tracked") == 1 and f"tracked {len(records)} records" in done.stdout
    for stage in ("sft", "resumed", "reward"):
        one, two = (
            [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
        assert len(one) == len(two) > 3
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"tokens_per_second"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (stage, key)
    whole, resumed = (load_file(tmp_path / "two" / stage / "model.safetensors") for stage in ("sft", "resumed"))
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_head_sharded_on_its_own(python):
    """FSDP2: the head's weight is whole inside its own call only, in forward and backward, where it is used."""
    done = python(*LAUNCH, str(Path(__file__).with_name("sharded_head.py")))
    assert done.returncode == 0, done.stderr
    assert "all gradients equal" in done.stdout


def test_sharded_training_is_refused_in_words(train, monkeypatch):
    """The loss can run under FSDP, but saving what it shards is not written yet."""
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", "FSDP")
    with pytest.raises(UsageError, match="FSDP: one process, or several by DDP"):
        train(model_name_or_path="m", dataset_name="d")
