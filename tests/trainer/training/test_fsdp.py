"""FSDP2 on 2 and 4 gloo processes: the weights of DDP and of one process, whole folders, killed and resumed."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_trainer.errors import UsageError
from rlhf_trainer.training import fsdp

SCRIPT = str(Path(__file__).with_name("sharded_stages.py"))
ALL = ("sft", "sft-lora", "dpo", "dpo-lora", "reward", "reward-lora", "grpo", "grpo-idle", "grpo-lora", "ppo")
SHARED = ("sft-sp", "dpo-sp")
RESUMED = ("sft", "dpo-lora", "reward", "grpo")
LAST = 5
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ROUNDING = 1e-5  # of an update: gradients are sums over processes, in another order


@pytest.fixture
def run_stages(python, model_folder, tokenizer, rows, write_jsonl, tmp_path):
    """(processes, folder, stages, behind) -> these are trained into `folder`, to their end or behind a step."""
    model, judge, data = model_folder("llama"), str(tmp_path / "judge"), write_jsonl(rows(10))
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(judge)
    tokenizer.save_pretrained(judge)

    def run(processes, folder, stages, behind=LAST + 1, **environment):
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        words = (SCRIPT, model, judge, data, folder, str(behind), *stages)
        done = python(*(launch if processes > 1 else ()), *words, ACCELERATE_USE_CPU="true", **environment)
        assert done.returncode == 0, done.stderr[-6000:]

    return run


def weights_of(folder):
    path = folder / "adapter_model.safetensors"
    return load_file(path if path.exists() else folder / "model.safetensors")


def difference(one, other, base):
    """Of the weights that two runs have made, over the whole update; an adapter's lora_B begins at zero."""
    assert one.keys() == other.keys()
    changed = [(name, base.get(name, torch.zeros(()))) for name in one if name in base or "lora_B" in name]
    update = sum((one[name] - before).double().square().sum() for name, before in changed) ** 0.5
    assert update > 0.05
    return float(sum((one[name] - other[name]).double().square().sum() for name in one) ** 0.5 / update)


@pytest.fixture
def base(model_folder):
    return load_file(Path(model_folder("llama")) / "model.safetensors")


def test_sharded_runs_are_those_of_one_process(run_stages, base, tmp_path):
    """On 4, some have nothing but a repeated micro-batch to do."""
    run_stages(1, "one", ALL)
    run_stages(2, "ddp", ALL)
    run_stages(2, "two", ALL, **FSDP)
    run_stages(4, "four", ALL, **FSDP)
    for stage in ALL:
        weights = {run: weights_of(tmp_path / run / stage) for run in ("one", "ddp", "two", "four")}
        for run in ("ddp", "two", "four"):
            assert difference(weights["one"], weights[run], base) < ROUNDING, (stage, run)
    shares = [line["frac_reward_zero_std"] for line in metrics_of(tmp_path / "ddp" / "grpo-idle")]
    assert any(0.25 < share < 1 for share in shares)  # some process had micro-batches of idle completions alone
    for stage, auto in (("dpo", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        model = auto.from_pretrained(tmp_path / "four" / stage)
        assert model.config.architectures == [type(model).__name__]  # not what sharding made of the class


def metrics_of(folder):
    """Without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in record.items() if name != "tokens_per_second"} for record in records]


def test_processes_that_share_sequences_train_as_one(run_stages, base, tmp_path):
    """Two with each half of every sequence; four, of which two do, and two have other sequences."""
    run_stages(1, "one", SHARED)
    run_stages(2, "ddp", SHARED)
    run_stages(4, "four", SHARED, **FSDP)
    for stage in SHARED:
        for run in ("ddp", "four"):
            weights = [weights_of(tmp_path / name / stage) for name in ("one", run)]
            assert difference(*weights, base) < ROUNDING, (stage, run)
            for one, other in zip(*(metrics_of(tmp_path / name / stage) for name in ("one", run)), strict=True):
                assert other == pytest.approx(one, rel=1e-4, abs=1e-5), (stage, run)


def test_a_killed_run_goes_on_in_another_number_of_processes(run_stages, base, tmp_path):
    """In the same number to the bit."""
    run_stages(2, "whole", RESUMED, **FSDP)
    run_stages(2, "same", RESUMED, behind=2, **FSDP)
    assert not (tmp_path / "same" / "sft").exists()
    run_stages(2, "same", RESUMED, **FSDP)
    run_stages(4, "fewer", RESUMED, behind=2, **FSDP)
    run_stages(2, "fewer", RESUMED, **FSDP)
    for stage in RESUMED:
        whole, same, fewer = (weights_of(tmp_path / run / stage) for run in ("whole", "same", "fewer"))
        assert all(whole[name].equal(same[name]) for name in whole), stage
        assert difference(whole, fewer, base) < ROUNDING, stage


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # the second one's embeddings are its head, too
def test_a_sharded_policy_is_saved_for_a_server_amid_its_training(python, model_folder, family):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script = str(Path(__file__).with_name("sharded_saving.py"))
    done = python(*launch, script, model_folder(family), "saved", ACCELERATE_USE_CPU="true", **FSDP)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "all weights equal" in done.stdout


def test_no_process_holds_an_fp32_copy(python, make_model, tokenizer, tmp_path):
    """Of a model of 100 MB in bf16; half of it in fp32 is what each keeps."""
    model = make_model("llama", vocab_size=32768, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script = str(Path(__file__).with_name("sharded_loading.py"))
    done = python(*launch, script, str(tmp_path / "model"), ACCELERATE_USE_CPU="true", **FSDP)
    assert done.returncode == 0, done.stderr[-6000:]
    shares = re.findall(r"of its own ([\d.]+) kept ([\d.]+)", done.stdout)
    assert len(shares) == 2
    for own, kept in shares:
        assert float(kept) == 0.5 and float(own) < 0.9, done.stdout


@pytest.fixture
def launched(monkeypatch):
    """What `sharding` reads; it is read anew in the test, and after it."""
    fsdp.sharding.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    fsdp.sharding.cache_clear()


def test_the_first_version_of_fsdp_is_refused(launched):
    launched.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match=r"expected fsdp_version 2 .* got 1"):
        fsdp.sharding()


def test_a_model_without_blocks_is_refused_in_words():
    with pytest.raises(UsageError, match=r"no blocks to shard .*it names none.*fsdp_transformer_layer_cls_to_wrap"):
        fsdp.blocks_of(torch.nn.Linear(2, 2), None)
    assert len(fsdp.blocks_of(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["Linear"])) == 1
