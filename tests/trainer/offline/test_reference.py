"""Reference log-probs: computed once, reused from disk, and never reused where anything they depend on differs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlhf_trainer.offline.reference_logprobs as reference
from rlhf_trainer.data.examples import Group
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.offline.reference_logprobs import content_key
from rlhf_trainer.training import files
from rlhf_trainer.training.batch_plan import plan_batches

GROUPS = [Group(i, [5, 6 + i], [[7, 8], [9, 10 + i, 11]], [(0, 1)], [0.0]) for i in range(6)]
PLAN = plan_batches([5] * 6, 4, 2, seed=0)


@pytest.fixture
def passes(monkeypatch):
    """Counts the forward passes of the reference."""
    calls = []
    compute = reference.sequence_logprobs
    monkeypatch.setattr(reference, "sequence_logprobs", lambda *args: (calls.append(1), compute(*args))[1])
    return calls


@pytest.fixture
def run(model_folder, rows, write_jsonl, train, tmp_path, passes):
    """Trains a step on 6 pairs; returns (passes of the reference, loss of each step)."""
    path = write_jsonl(rows(6))

    def go(**options):
        before = len(passes)
        settings = {"model_name_or_path": model_folder("llama"), "dataset_name": path, "batch_size": 4}
        records = train(**(settings | {"micro_batch_size": 2} | options))[1]
        return len(passes) - before, [record["loss"] for record in records]

    return go


def test_the_second_run_reuses_the_first_ones(run, tmp_path):
    first, losses = run()
    assert first == 3
    assert run() == (0, losses)
    assert run(beta=0.3, learning_rate=1e-4, optim="adamw_torch", num_train_epochs=2)[0] == 0  # no bearing on them
    (file,) = (tmp_path / "cache").iterdir()  # and nothing beside it is left over
    assert file.suffix == ".safetensors"


@pytest.mark.parametrize(
    "change",
    [{"bf16": True}, {"micro_batch_size": 1}, {"seed": 9}, {"max_length": 50}, {"model": "gpt2"}],
    ids=lambda change: "".join(change),
)
def test_what_changes_them_is_computed_anew(change, run, model_folder, write_jsonl, rows):
    options = dict(change)
    if "model" in options:
        options = {"ref_model_name_or_path": model_folder(options["model"])}
    if "max_length" in options:  # cuts a response of this data set
        options["dataset_name"] = write_jsonl([*rows(5), rows(1)[0] | {"chosen": " cat" * 60}], "long.jsonl")
        assert run(dataset_name=options["dataset_name"])[0] == 3
    else:
        assert run()[0] == 3
    assert run(**options)[0] > 0


def test_simpo_needs_no_reference(run, tmp_path):
    assert run(loss_type="simpo", beta=2.0)[0] == 0
    assert not (tmp_path / "cache").exists()


def damaged_bytes(path):
    path.write_bytes(path.read_bytes()[:-10])


def flipped_value(path):
    """The work of a bad disk: a valid file with another number in it."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x10
    path.write_bytes(content)


def other_count(path):
    save_file({"logps": torch.zeros(11)}, path)


def other_name(path):
    save_file({"values": load_file(path)["logps"]}, path)


@pytest.mark.parametrize("damage", [damaged_bytes, flipped_value, other_count, other_name])
def test_a_damaged_file_is_reported_and_made_anew(damage, run, tmp_path):
    _, losses = run()
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    damage(file)
    with pytest.warns(UserWarning, match=rf"{file.name} are .* computed again"):
        assert run() == (3, losses)
    assert file.read_bytes() == good
    assert run()[0] == 0


def test_a_failed_write_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="not kept for the next run: disk full"):
        run()  # goes on
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_key_knows_weights_config_tokens_plan_and_precision(make_model):
    def key(seed=0, groups=GROUPS, plan=PLAN, pad_id=1, bf16=False, device="cpu", shared=False, **changes):
        fused = FusedLM(make_model("gemma2", seed, **changes), bf16=bf16)
        return content_key(fused, groups, plan, pad_id, device, shared)

    other = [*GROUPS[:-1], GROUPS[-1]._replace(responses=[[7, 9], [9, 15, 11]])]
    moved = [*GROUPS[:-1], GROUPS[-1]._replace(prompt=[5], responses=[[11, 7, 8], [11, 9, 15, 11]])]  # masked otherwise
    keys = [
        key(),
        key(seed=1),
        key(final_logit_softcapping=4.0),  # no weight changes
        key(groups=other),
        key(groups=moved),
        key(shared=True),
        key(plan=plan_batches([5] * 6, 4, 2, seed=1)),
        key(pad_id=2),
        key(bf16=True),
        key(device="cuda"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_where_the_model_lies_does_not_matter(make_model, model_folder, tmp_path):
    from rlhf_trainer.models.loading import load_causal_lm

    first = load_causal_lm(model_folder("llama"), key="m")
    first.save_pretrained(tmp_path / "moved")
    second = load_causal_lm(str(tmp_path / "moved"), key="m")
    keys = [content_key(FusedLM(model), GROUPS, PLAN, 1, "cpu", False) for model in (first, second)]
    assert keys[0] == keys[1]
