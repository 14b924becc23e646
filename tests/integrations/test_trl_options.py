"""The options of TRL's trainers, fused and not: each gives TRL's own numbers."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (the extra `trl`)")
pytest.importorskip("peft", reason="peft is not installed (the extra `trl`)")

import peft
import trl

from rlhf_kernels.integrations import scores
from rlhf_kernels.integrations.trl import fused
from tests.integrations.trl_cases import (
    TRAINERS,
    VERSION,
    assert_same,
    calls_of_the_op,
    make_model,
    make_trainer,
    rows,
    steps_of,
)


def lora(**options):
    """A config whose adapter does something from the start."""
    return peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def compare(kind, folder, scored, family="llama", dtype=None, relative=1e-4, frozen=(), **options):
    """Steps of TRL's class and of the fused one; returns the latter. `frozen`: submodules that are not trained."""
    made = []
    for cls in (TRAINERS[kind], fused(TRAINERS[kind])):
        model = make_model(family).to(dtype)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        own = dict(options)
        if kind == "DPO" and own.pop("reference", True) and "peft_config" not in own:
            own["ref_model"] = make_model(family, seed=1).to(dtype)
        torch.manual_seed(7)  # of adapters, which the constructor makes
        made.append(steps_of(make_trainer(cls, kind, folder / cls.__name__, model, **own)))
        assert bool(scored) == (cls is not TRAINERS[kind])
    assert_same(made[1], made[0], relative)
    return made[1]


DPO_OPTIONS = {
    "adapter": {"peft_config": lora()},
    "adapter with DoRA": {"peft_config": lora(use_dora=True)},
    "trained copy of the head": {"peft_config": lora(modules_to_save=["lm_head"])},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "precomputed by the policy": {"precompute_ref_log_probs": True, "reference": False},
    "precomputed without the adapter": {"precompute_ref_log_probs": True, "peft_config": lora()},
    "reference of its own": {"reference": False},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "sft alone": {"loss_type": ["sft"]},
    "discopop": {"loss_type": ["discopop"]},
    "ipo": {"loss_type": ["ipo"]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "weighting": {"use_weighting": True},
    "weighting with a soft cap": {"use_weighting": True, "family": "gemma2"},
    "length desensitised": {"ld_alpha": 0.4},
    "length desensitised, precomputed": {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "JS divergence": {"f_divergence_type": "js_divergence"},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_dpo(name, tmp_path, scored):
    compare("DPO", tmp_path, scored, **DPO_OPTIONS[name])


GRPO_OPTIONS = {
    "adapter and KL": {"peft_config": lora(), "beta": 0.1},
    "KL over two iterations": {"beta": 0.1, "num_iterations": 2},
    "entropy bonus": {"entropy_coef": 0.5},
    "entropy bonus with a soft cap": {"entropy_coef": 0.5, "family": "gemma2"},
    "entropy bonus of uncertain tokens": {"entropy_coef": 0.5, "top_entropy_quantile": 0.5},
    "uncertain tokens": {"top_entropy_quantile": 0.3},
    "steps per generation": {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 3},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "grpo": {"loss_type": "grpo"},
    "sequences": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "every completion cut, so none counts": {"mask_truncated_completions": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", GRPO_OPTIONS)
def test_grpo(name, tmp_path, scored):
    """In dapo's way where nothing else is said."""
    compare("GRPO", tmp_path, scored, **({"loss_type": "dapo"} | GRPO_OPTIONS[name]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_grpo_with_the_head_in_fp32(family, tmp_path, scored):
    """TRL puts a function in place of the head's forward; bf16 elsewhere, so gradients agree to bf16's rounding."""
    options = {"cast_lm_head_to_fp32": True, "dtype": torch.bfloat16, "relative": 2e-2, "max_steps": 1}
    compare("GRPO", tmp_path, scored, family, **options)
    scored.clear()
    compare("GRPO", tmp_path, scored, family, cast_lm_head_to_fp32=True)  # in fp32, to the usual bar


@pytest.mark.skipif(VERSION < (1, 15), reason="under autocast TRL 1.13 does not keep the head in fp32 either")
def test_the_head_in_fp32_under_autocast(tmp_path, monkeypatch, scored):
    """Nothing of the head is rounded to bf16, here as in TRL, whatever autocast does elsewhere.

    Trained are the head and the norm before it, whose gradients stay in fp32. Further down autocast rounds them to bf16
    at every layer, and makes 1e-3 of a difference of 1e-7 wherever the two fall on different sides of a rounding.
    """
    records = []
    own = scores.linear_logprobs

    def watched(hidden, *others, **options):
        records.append((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return own(hidden, *others, **options)

    monkeypatch.setattr(scores, "linear_logprobs", watched)
    options = {"bf16": True, "max_steps": 1}
    frozen = ("model.embed_tokens", "model.layers")
    compare("GRPO", tmp_path, scored, cast_lm_head_to_fp32=True, relative=1e-5, frozen=frozen, **options)
    assert set(records) == {(torch.float32, False)}
    records.clear()
    steps_of(make_trainer(fused(trl.GRPOTrainer), "GRPO", tmp_path / "plain", make_model("llama"), **options))
    assert {autocast for _, autocast in records} == {True}


RLOO_OPTIONS = {
    "two iterations": {"num_iterations": 2},
    "adapter": {"peft_config": lora(), "beta": 0.1},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("name", RLOO_OPTIONS)
def test_rloo(name, tmp_path, scored):
    compare("RLOO", tmp_path, scored, **RLOO_OPTIONS[name])


SFT_OPTIONS = {
    "nll": {"loss_type": "nll"},
    "dft": {"loss_type": "dft"},
    "dft with a soft cap": {"loss_type": "dft", "family": "gemma2"},
    "adapter": {"peft_config": lora()},
    "all tokens": {"completion_only_loss": False},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "gradient accumulation of dft": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "loss_type": "dft"
    },
    "experts, gradient accumulation": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "family": "mixtral"
    },
    "packed": {"packing": True, "max_length": 40, "per_device_train_batch_size": 1},
    "without padding": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SFT_OPTIONS)
def test_sft(name, tmp_path, scored):
    """1.13: in chunks ("chunked_nll") where nothing else is said."""
    compare("SFT", tmp_path, scored, **SFT_OPTIONS[name])


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation(kind, tmp_path, scored):
    """While training and by itself, of a dataset given then."""
    logged = []
    for cls in (TRAINERS[kind], fused(TRAINERS[kind])):
        reference = {"ref_model": make_model("llama", seed=1)} if kind == "DPO" else {}
        trainer = make_trainer(
            cls, kind, tmp_path / cls.__name__, make_model("llama"), eval_dataset=rows(kind, 8, seed=1),
            eval_strategy="steps", eval_steps=1, **reference,
        )  # fmt: skip
        trainer.train()
        torch.manual_seed(0)
        later = trainer.evaluate(rows(kind, 8, seed=2))
        logged.append([*(e for e in trainer.state.log_history if "eval_loss" in e), later])
    assert len(logged[0]) >= 3
    assert_same(logged[1], logged[0])
    assert scored


@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_metrics_of_logits(kind, tmp_path):
    """`compute_metrics` gets the logits of the model's own forward, as in TRL."""
    arguments = []

    def compute_metrics(predictions):
        arguments.append(predictions.predictions)
        return {"spread": float(np.std(predictions.predictions))}

    logged = []
    for cls in (TRAINERS[kind], fused(TRAINERS[kind])):
        reference = {"ref_model": make_model("llama", seed=1)} if kind == "DPO" else {"loss_type": "nll"}
        trainer = make_trainer(
            cls, kind, tmp_path / cls.__name__, make_model("llama"), eval_dataset=rows(kind, 8, seed=1),
            compute_metrics=compute_metrics, per_device_eval_batch_size=8, **reference,
        )  # fmt: skip
        logged.append([trainer.evaluate()])
    assert_same(logged[1], logged[0])
    assert arguments[0].ndim == 3
    np.testing.assert_allclose(arguments[1], arguments[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(VERSION != (1, 13), reason="TRL 1.15 and later let Liger replace layers alone")
@pytest.mark.parametrize("kind", ["DPO", "GRPO", "SFT"])
def test_liger_is_refused(kind, tmp_path):
    """TRL 1.13 would compute the loss by it."""
    options = {"loss_type": "nll"} if kind == "SFT" else {}
    with pytest.raises(ValueError, match="use_liger_kernel=True: Liger would compute the losses"):
        make_trainer(fused(TRAINERS[kind]), kind, tmp_path, make_model("llama"), use_liger_kernel=True, **options)


@pytest.mark.skipif(VERSION < (1, 15), reason="TRL 1.13 has no such refusal to be lifted")
@pytest.mark.parametrize("kind", ["DPO", "GRPO", "RLOO"])
def test_an_adapter_on_the_head_learns(kind, tmp_path, scored):
    """TRL refuses one, as it would leave it out."""
    options = {"peft_config": lora(target_modules=["lm_head"])}
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        make_trainer(TRAINERS[kind], kind, tmp_path, make_model("llama"), **options)
    trainer = make_trainer(fused(TRAINERS[kind]), kind, tmp_path, make_model("llama"), **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert steps_of(trainer)[0]["grad_norm"] > 0 and scored
    assert all("lm_head" in name for name in before)
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_an_adapter_on_the_head_and_the_head_in_fp32_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cast_lm_head_to_fp32=True.* adapter"):
        make_trainer(
            fused(trl.GRPOTrainer), "GRPO", tmp_path, make_model("llama"), cast_lm_head_to_fp32=True,
            peft_config=lora(target_modules=["lm_head"]),
        )  # fmt: skip


@pytest.fixture
def scored(monkeypatch):
    return calls_of_the_op(monkeypatch)
