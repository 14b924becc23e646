"""`rlhf dpo` against a plain eager-torch DPO loop, and what must not change its result."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_kernels as rk
from rlhf_trainer.data.examples import Group
from rlhf_trainer.errors import TrainingError, UsageError
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.offline.dpo import pair_metrics, tokens_of
from rlhf_trainer.offline.pair_batches import collate_groups
from rlhf_trainer.training.task import LossOutput, Totals

METRICS = {
    "loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected",
}  # fmt: skip
STEP_METRICS = {*METRICS, "grad_norm", "learning_rate", "tokens_per_second", "step", "epoch"}


def eager_batch(tokenizer, rows):
    """The whole batch, padded by hand: ids, attention, response mask, each [2P, T]."""
    sequences = []
    for column in ("chosen", "rejected"):
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            response = tokenizer(row[column] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            sequences.append((prompt, response))
    width = max(len(p) + len(r) for p, r in sequences)
    ids, attention, response_mask = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(3))
    for i, (p, r) in enumerate(sequences):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        attention[i, : len(p) + len(r)] = 1
        response_mask[i, len(p) : len(p) + len(r)] = 1
    return ids, attention, response_mask


def eager_logps(model, ids, attention, response_mask):
    logits = model(input_ids=ids, attention_mask=attention).logits
    per_token = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (per_token * response_mask[:, 1:]).sum(-1)


def eager_dpo(folder, rows, steps, beta, learning_rate, warmup, max_norm, reference=None):
    """DPO as its paper states it, with full logits; returns per step (loss, gradient norm), and the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = copy.deepcopy(policy) if reference is None else reference
    batch = eager_batch(tokenizer, rows)
    with torch.no_grad():
        ref_chosen, ref_rejected = eager_logps(reference, *batch).chunk(2)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=learning_rate)
    history = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warmup)
        chosen, rejected = eager_logps(policy, *batch).chunk(2)
        loss = -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, policy


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "cohere"])
def test_equals_an_eager_loop_step_by_step(family, model_folder, rows, write_jsonl, train):
    folder, data = model_folder(family), rows(8)
    options = {"beta": 0.2, "learning_rate": 3e-4}
    history, policy = eager_dpo(folder, data, steps=5, warmup=3, max_norm=0.5, **options)
    # The warm-up must be seen to rise, clipping to clip, and the loss to move: else equality would show little.
    assert history[4][0] < history[0][0] - 0.1
    assert max(norm for _, norm in history) > 0.5

    output, records = train(
        model_name_or_path=folder, dataset_name=write_jsonl(data), num_train_epochs=5, batch_size=8, micro_batch_size=3,
        warmup_steps=3, max_grad_norm=0.5, **options,
    )  # fmt: skip

    assert len(records) == 5
    for record, (loss, norm) in zip(records, history, strict=True):
        assert record["loss"] == pytest.approx(loss, abs=1e-4)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(output)
    batch = eager_batch(AutoTokenizer.from_pretrained(output), data)
    with torch.no_grad():
        torch.testing.assert_close(eager_logps(trained, *batch), eager_logps(policy, *batch), atol=2e-3, rtol=1e-4)


def test_a_reference_of_its_own(model_folder, make_model, tokenizer, rows, write_jsonl, train, tmp_path):
    """ref_model_name_or_path: the loss starts away from log 2, where the eager loop says."""
    other = make_model("gpt2", seed=7)
    other.save_pretrained(tmp_path / "other")
    folder, data = model_folder("llama"), rows(6)
    history, _ = eager_dpo(
        folder, data, steps=2, beta=0.1, learning_rate=3e-4, warmup=1, max_norm=1.0, reference=other
    )  # fmt: skip
    assert abs(history[0][0] - math.log(2)) > 0.01
    _, records = train(
        model_name_or_path=folder, ref_model_name_or_path=str(tmp_path / "other"), dataset_name=write_jsonl(data),
        num_train_epochs=2, learning_rate=3e-4, max_grad_norm=1.0,
    )  # fmt: skip
    assert [r["loss"] for r in records] == pytest.approx([loss for loss, _ in history], abs=1e-4)
    assert [r["grad_norm"] for r in records] == pytest.approx([norm for _, norm in history], rel=1e-4)


def test_metrics_of_a_step(model_folder, rows, write_jsonl, train):
    """Every key of the contract; the first step starts at the reference; rewards and log-probs are the eager ones."""
    folder, data = model_folder("llama"), rows(6)
    _, records = train(
        model_name_or_path=folder,
        dataset_name=write_jsonl(data),
        num_train_epochs=2,
        warmup_steps=0.9,
        micro_batch_size=4,
    )
    assert all(set(record) == STEP_METRICS for record in records)
    first, second = records
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3 / 2, 1e-3])
    assert [(r["step"], r["epoch"]) for r in records] == [(1, 1.0), (2, 2.0)]

    batch = eager_batch(AutoTokenizer.from_pretrained(folder), data)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        chosen, rejected = eager_logps(model, *batch).chunk(2)
    assert first["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-3)
    assert first["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-3)
    gain = 0.1 * (second["logps/chosen"] - first["logps/chosen"])
    assert second["rewards/chosen"] == pytest.approx(gain, abs=1e-3)
    assert second["rewards/margins"] == pytest.approx(second["rewards/chosen"] - second["rewards/rejected"], abs=1e-5)
    assert second["rewards/margins"] > 0.01
    assert 0.5 < second["rewards/accuracies"] <= 1.0
    assert second["tokens_per_second"] > 0


def test_a_tie_is_not_accurate_and_a_share_weighs_what_it_is_worth():
    """Three pairs, one right, one wrong, one tied; half of a batch."""
    chosen, rejected = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    logps = torch.tensor([-1.0, -4.0, -2.0, -5.0, -3.0, -6.0])  # pair by pair
    groups = [Group(1, [1], [[2, 3], [4]], [(0, 1)], [0.0])] * 3
    pairs = collate_groups(groups, pad_id=0)
    result = rk.LinearDPOLoss(torch.tensor(0.7), chosen, rejected, logps, None)
    totals = Totals()
    output = LossOutput(result.loss, pair_metrics(result, pairs), torch.tensor(tokens_of(groups)))
    totals.add(output, 0.5)
    totals.add(output, 0.0)  # a repeated micro-batch adds nothing
    expected = {"loss": 0.7, "rewards/chosen": 0.5, "rewards/rejected": 0.5, "rewards/accuracies": 1 / 3}
    expected |= {"rewards/margins": 0.0, "logps/chosen": -2.0, "logps/rejected": -5.0}
    metrics, tokens = totals.reduce(Accelerator(cpu=True))
    assert metrics == pytest.approx({name: value / 2 for name, value in expected.items()})
    assert tokens == 15


def test_accumulation_equals_one_big_batch(model_folder, rows, write_jsonl, train):
    """10 pairs in batches of 7 (a ragged last one, 3), as one micro-batch or as 2 + 2 + 2 + 1: the same numbers."""
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(10)), "num_train_epochs": 3}
    results = [train(**common, batch_size=7, micro_batch_size=micro) for micro in (7, 2)]
    (whole, whole_records), (split, split_records) = results
    assert len(whole_records) == len(split_records) == 6
    for a, b in zip(whole_records, split_records, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), key
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, split)]
    start = AutoModelForCausalLM.from_pretrained(common["model_name_or_path"]).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (weights[0][name] - start[name]).norm()
    assert moved > 0.01
    assert (weights[0][name] - weights[1][name]).norm() < 0.01 * moved


def test_same_seed_same_run_other_seed_other_batches(model_folder, rows, write_jsonl, train):
    common = {"model_name_or_path": model_folder("gpt2"), "dataset_name": write_jsonl(rows(12)), "batch_size": 4}
    losses = [[r["loss"] for r in train(**common, num_train_epochs=2, seed=seed)[1]] for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_gradient_checkpointing_changes_nothing_but_memory(model_folder, rows, write_jsonl, train, monkeypatch):
    """GPT-2 has dropout 0.1 in its config: train mode, which checkpointing needs, must not bring it back."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls = []
    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    common = {"model_name_or_path": model_folder("gpt2"), "dataset_name": write_jsonl(rows(8)), "num_train_epochs": 3}
    plain = train(**common)[1]
    plain_calls = len(calls)
    calls.clear()
    output, checkpointed = train(**common, gradient_checkpointing=True)
    assert len(calls) == plain_calls - 2 + 3 * 2  # reference cached: 2 layers fewer; recomputed: 2 layers more a step
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-6)
    saved = json.loads((output / "config.json").read_text())
    assert saved["resid_pdrop"] == 0.1  # off for DPO, but still the model's own


def test_bf16_computes_in_bf16_on_fp32_master_weights(model_folder, rows, write_jsonl, train):
    folder, data = model_folder("llama"), write_jsonl(rows(8))
    fp32 = train(model_name_or_path=folder, dataset_name=data, num_train_epochs=2, learning_rate=1e-5)[1]
    output, bf16 = train(
        model_name_or_path=folder, dataset_name=data, num_train_epochs=2, learning_rate=1e-5, bf16=True
    )
    assert bf16[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference sees the same rounding
    assert bf16[0]["logps/chosen"] != fp32[0]["logps/chosen"]
    assert bf16[0]["logps/chosen"] == pytest.approx(fp32[0]["logps/chosen"], rel=2e-2)
    assert bf16[0]["grad_norm"] == pytest.approx(fp32[0]["grad_norm"], rel=5e-2)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32, name
    step = (after["lm_head.weight"] - before["lm_head.weight"]).abs()
    vanished = before["lm_head.weight"].bfloat16() == after["lm_head.weight"].bfloat16()
    assert (step[vanished] > 0).float().mean() > 0.5  # moves too small for bf16 weights are kept


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("hinge", {}),
        ("ipo", {}),
        ("ipo_mean", {}),
        ("robust", {"label_smoothing": 0.2}),
        ("sigmoid", {"label_smoothing": 0.1}),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.3}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("sppo", {}),
        ("nca", {}),
        ("exo", {"label_smoothing": 1e-3}),
        ("aot", {}),
        ("discopop", {}),
    ],
)
def test_every_loss_type_reaches_the_loss(loss_type, options, model_folder, rows, write_jsonl, train):
    """Step 2's loss is `rk.dpo_loss` of the log-probs of the model after step 1."""
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(rows(6)), "loss_type": loss_type}
    common |= options | {"learning_rate": 1e-4, "warmup_steps": 0}
    after_one, _ = train(**common, max_steps=1)
    records = train(**common, max_steps=2)[1]
    tokenizer = AutoTokenizer.from_pretrained(after_one)
    batch = eager_batch(tokenizer, rows(6))
    counts = batch[2].sum(-1)
    with torch.no_grad():
        logps, ref = (
            eager_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), *batch)
            for folder in (after_one, common["model_name_or_path"])
        )
    expected = rk.dpo_loss(
        logps, None if loss_type == "simpo" else ref, torch.arange(6), torch.arange(6, 12), common.get("beta", 0.1),
        loss_type=loss_type, label_smoothing=common.get("label_smoothing", 0.0),
        gamma=common.get("gamma_beta_ratio", 0.5), token_counts=counts,
    ).losses.mean()  # fmt: skip
    assert records[1]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    if loss_type == "discopop":  # rises first: between its two parts it is not monotone
        assert records[1]["loss"] != pytest.approx(records[0]["loss"], abs=1e-2)
    else:
        assert records[1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_adamw_and_weight_decay(optim, model_folder, rows, write_jsonl, train):
    """One step of AdamW from lr and decay alone: where the gradient is tiny, a weight shrinks by lr * decay."""
    folder = model_folder("gpt2")
    output, _ = train(
        model_name_or_path=folder, dataset_name=write_jsonl(rows(4)), max_steps=1, optim=optim,
        weight_decay=0.5, learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    before, after = (AutoModelForCausalLM.from_pretrained(f).transformer.wpe.weight for f in (folder, output))
    untouched = slice(90, 96)  # positions that no row reaches: no gradient at all
    torch.testing.assert_close(after[untouched], before[untouched] * (1 - 1e-2 * 0.5))
    reached = (after[:3] - before[:3] * (1 - 1e-2 * 0.5)).abs()
    torch.testing.assert_close(reached.median(), torch.tensor(1e-2), rtol=0.01, atol=0)  # Adam's first step is lr


def test_held_out_pairs(model_folder, rows, write_jsonl, train):
    """Evaluated before training, every eval_steps, and at the end; here on the training pairs, so they must agree."""
    data = write_jsonl(rows(8))
    _, records = train(
        model_name_or_path=model_folder("llama"), dataset_name=data, eval_dataset=data, eval_steps=2, num_train_epochs=5
    )
    evaluated = [r["step"] for r in records if "eval/loss" in r]
    assert evaluated == [0, 2, 4, 5]
    by_step = {r["step"]: r for r in records}
    assert by_step[2]["eval/loss"] == pytest.approx(by_step[3]["loss"], abs=1e-4)
    assert by_step[2]["eval/rewards/margins"] == pytest.approx(by_step[3]["rewards/margins"], abs=1e-4)
    assert {key for key in records[0] if key.startswith("eval/")} == {f"eval/{name}" for name in METRICS}


def test_a_run_that_diverges_stops_and_names_the_step(model_folder, rows, write_jsonl, train, tmp_path):
    with pytest.raises(TrainingError, match=r"step \d+: stopped before the update.*rows \[1, 2, 3, 4\]"):
        train(
            model_name_or_path=model_folder("gpt2"), dataset_name=write_jsonl(rows(4)), num_train_epochs=20,
            learning_rate=1e30, warmup_steps=0, output_dir=str(tmp_path / "diverges"),
        )  # fmt: skip
    assert not (tmp_path / "diverges").exists()
    assert (tmp_path / "diverges.partial" / "metrics.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "ipo", "beta": 0.0}, "beta"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"loss_type": "aot", "batch_size": 8, "micro_batch_size": 4}, "a batch must be one micro-batch"),
        ({"loss_type": "simpo", "ref_model_name_or_path": "r"}, "loss_type simpo has no reference"),
    ],
)
def test_loss_options_are_checked_before_anything_is_loaded(options, message, train):
    with pytest.raises(UsageError, match=message):
        train(model_name_or_path="/nowhere/at/all", dataset_name="/nowhere/at/all.jsonl", **options)


def test_defaults_are_the_lectures():
    defaults = {f.name: f.default for f in dataclasses.fields(DPOConfig)}
    lecture = {"beta": 0.1, "optim": "rmsprop", "learning_rate": 1e-6, "batch_size": 64}
    assert {name: defaults[name] for name in lecture} == lecture
