"""Lightning's own Trainer, with our mixins and with the same modules written plainly from logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
pytorch_lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

# ruff: noqa: E402
from rlhf_kernels.integrations.lightning import FusedDPOMixin, _chosen_then_rejected
from rlhf_kernels.integrations.transformers import patch_causal_lm
from tests.integrations.lightning_modules import (
    BETA,
    PAIRS,
    FusedDPO,
    FusedSFT,
    PlainSFT,
    Recorded,
    V,
    conversations,
    fit,
    fused_dpo,
    llama,
    logps_of,
    pairs,
    plain_dpo,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|no `val_dataloader`).*")


def assert_same(ours, plain):
    assert len(ours.norms) == len(plain.norms) > 0
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.norms == pytest.approx(plain.norms, rel=1e-5)
    torch.testing.assert_close(ours.parameters_as_one(), plain.parameters_as_one(), rtol=1e-4, atol=1e-5)


def test_dpo_is_that_of_a_plain_module(tmp_path):
    plain, ours = plain_dpo(), fused_dpo()
    start = ours.parameters_as_one()
    fit(plain, pairs(3 * PAIRS), tmp_path)
    fit(ours, pairs(3 * PAIRS), tmp_path)
    assert (ours.parameters_as_one() - start).norm() > 0.1, "nothing was learned, so equality would show little"
    assert_same(ours, plain)


def test_the_other_package_name_takes_the_mixin_too(tmp_path):
    class Module(FusedDPOMixin, Recorded, pytorch_lightning.LightningModule):
        beta = BETA

    plain, ours = plain_dpo(), fused_dpo(Module)
    fit(plain, pairs(PAIRS), tmp_path)
    fit(ours, pairs(PAIRS), tmp_path, trainer=pytorch_lightning.Trainer)
    assert_same(ours, plain)


def test_sft_is_transformers_own_loss(tmp_path):
    plain, ours = PlainSFT(llama()), FusedSFT(patch_causal_lm(llama()))
    for module in (plain, ours):
        trainer = fit(module, conversations(2 * PAIRS), tmp_path)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(ours.losses[-1])
    assert_same(ours, plain)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole, plain, ours = fused_dpo(), plain_dpo(), fused_dpo()
    fit(whole, pairs(2 * PAIRS), tmp_path)
    for module in (plain, ours):
        fit(module, pairs(2 * PAIRS), tmp_path, batch_size=PAIRS // 2, accumulate_grad_batches=2)
    assert len(ours.norms) == 2
    assert_same(ours, plain)
    assert ours.norms == pytest.approx(whole.norms, rel=1e-5)


def test_validation_and_metrics(tmp_path):
    """Over an epoch of unlike batches, 4 and 2 pairs: means over pairs, not over batches."""
    held_out = pairs(PAIRS + 2, seed=5)
    results = {}
    for name, module in (("plain", plain_dpo()), ("ours", fused_dpo())):
        results[name] = fit(module, pairs(PAIRS), tmp_path, validation=held_out).callback_metrics
    assert results["ours"]["val/loss"].item() == pytest.approx(results["plain"]["val/loss"].item(), rel=1e-5)
    names = {"loss", "logps/chosen", "logps/rejected"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    assert set(results["ours"]) == {f"{stage}/{name}" for stage in ("train", "val") for name in names}

    trained = fused_dpo()
    fit(trained, pairs(PAIRS), tmp_path)
    batch = default_collate(held_out)
    logps, ref_logps = (
        {side: logps_of(model, batch, side) for side in ("chosen", "rejected")}
        for model in (trained.model, trained.ref_model)
    )
    rewards = {side: BETA * (logps[side] - ref_logps[side]) for side in logps}
    expected = {
        "logps/chosen": logps["chosen"].mean(),
        "rewards/chosen": rewards["chosen"].mean(),
        "rewards/rejected": rewards["rejected"].mean(),
        "rewards/margins": (rewards["chosen"] - rewards["rejected"]).mean(),
        "rewards/accuracies": (rewards["chosen"] > rewards["rejected"]).float().mean(),
    }
    for name, value in expected.items():
        assert results["ours"][f"val/{name}"].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_reference_logps_of_the_batch_come_first(tmp_path):
    rows = pairs(PAIRS)
    reference = llama(1)
    with torch.no_grad():
        logps = {side: logps_of(reference, default_collate(rows), side) for side in ("chosen", "rejected")}
    for i, row in enumerate(rows):
        row |= {f"ref_{side}_logps": logps[side][i] for side in logps}
    plain, ours = plain_dpo(), FusedDPO(patch_causal_lm(llama()))
    fit(plain, pairs(PAIRS), tmp_path)
    fit(ours, rows, tmp_path)
    assert_same(ours, plain)


def with_lora(model):
    torch.manual_seed(7)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_alpha=4)
    return get_peft_model(model, adapters)


def test_without_adapters_the_model_is_its_own_reference(tmp_path):
    plain = plain_dpo()
    plain.model, plain.ref_model = with_lora(llama()), llama().requires_grad_(False)
    ours = FusedDPO(patch_causal_lm(with_lora(llama())))
    for module in (plain, ours):
        fit(module, pairs(PAIRS), tmp_path)
    assert_same(ours, plain)


def test_other_losses_take_their_options(tmp_path):
    ours = FusedDPO(patch_causal_lm(llama()))
    ours.loss_type, ours.beta, ours.gamma = "simpo", 2.0, 0.3
    fit(ours, pairs(PAIRS), tmp_path)
    batch, model = default_collate(pairs(PAIRS)), llama()
    means = [
        logps_of(model, batch, side) / (batch[f"{side}_labels"][:, 1:] != -100).sum(-1)
        for side in ("chosen", "rejected")
    ]
    expected = -torch.nn.functional.logsigmoid(2.0 * (means[0] - means[1] - 0.3)).mean()
    assert ours.losses[0] == pytest.approx(expected.item(), rel=1e-5)


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
        initializer_range=0.3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_a_mixture_of_experts_adds_its_load_balancing_loss(tmp_path):
    ours = FusedDPO(patch_causal_lm(mixtral()), patch_causal_lm(mixtral()).requires_grad_(False))
    fit(ours, pairs(PAIRS), tmp_path)
    batch = default_collate(pairs(PAIRS))
    sides = [batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask") for side in ("chosen", "rejected")]
    ids, mask = (torch.cat([torch.nn.functional.pad(a, (0, 3)), b]) for a, b in (sides[:2], sides[2:]))
    aux_loss = mixtral()(input_ids=ids, attention_mask=mask).aux_loss
    # The policy is the reference, so the pairs' loss is log 2.
    assert ours.losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item() + 0.5 * aux_loss.item(), rel=1e-5)


def test_mixed_precision(tmp_path):
    plain, ours = plain_dpo(), fused_dpo()
    fit(plain, pairs(3 * PAIRS), tmp_path)
    fit(ours, pairs(3 * PAIRS), tmp_path, precision="bf16-mixed")
    assert ours.losses == pytest.approx(plain.losses, rel=0.05)
    assert ours.losses != plain.losses, "not in bf16"
    assert all(p.dtype is torch.float32 for p in ours.model.parameters())


def test_two_processes_train_as_one(tmp_path):
    """Each has other pairs. Without the synchronisation that DDP does, process 0 would follow its own half."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
            "tests.integrations.lightning_modules", str(tmp_path / "found.json"),
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "found.json").read_text())
    assert two["world_size"] == 2

    one, half = fused_dpo(), fused_dpo()
    metrics = fit(one, pairs(3 * PAIRS), tmp_path, validation=pairs(PAIRS, seed=5)).callback_metrics
    fit(half, pairs(3 * PAIRS)[::2], tmp_path, batch_size=PAIRS // 2)
    assert two["norms"] == pytest.approx(one.norms, rel=1e-4)
    torch.testing.assert_close(torch.tensor(two["parameters"]), one.parameters_as_one(), rtol=1e-4, atol=1e-5)
    assert two["val/loss"] == pytest.approx(metrics["val/loss"].item(), rel=1e-5)
    assert two["losses"][0] == pytest.approx(half.losses[0], rel=1e-5), "process 0 has every other pair"
    assert two["norms"][0] != pytest.approx(half.norms[0], rel=1e-2)


def test_a_model_that_is_not_patched_is_refused():
    with pytest.raises(ValueError, match=r"CausalLMOutputWithPast instead of log-probs.*patch_causal_lm"):
        FusedDPO(llama()).loss_and_metrics(default_collate(pairs(2)))


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match=r"'sigmoid' needs a reference: set self.ref_model"):
        FusedDPO(patch_causal_lm(llama())).loss_and_metrics(default_collate(pairs(2)))


def test_a_reference_that_would_be_trained_is_refused():
    module = FusedDPO(patch_causal_lm(llama()), patch_causal_lm(llama(1)))
    with pytest.raises(ValueError, match="not frozen"):
        module.loss_and_metrics(default_collate(pairs(2)))


def test_dropout_has_no_place_in_the_reference():
    module = fused_dpo()
    module.train()
    module.loss_and_metrics(default_collate(pairs(2)))
    assert module.model.training and not module.ref_model.training


def gpt2():
    """Dropout is 0.1 by default."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def gpt2_with_lora():
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.5))
    model.train()
    model.base_model.model.transformer.h[0].eval()  # as someone who freezes a layer's dropout would
    return patch_causal_lm(model)


def test_dropout_has_no_place_in_a_reference_without_adapters():
    batch = default_collate(pairs(2))
    inputs = _chosen_then_rejected(batch)
    ours, theirs = FusedDPO(gpt2_with_lora()), FusedDPO(gpt2_with_lora(), patch_causal_lm(gpt2()).requires_grad_(False))
    before = [module.training for module in ours.model.modules()]
    assert len(set(before)) == 2
    first, second = (ours._reference_logps(batch, inputs) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, theirs._reference_logps(batch, inputs))
    assert [module.training for module in ours.model.modules()] == before

    losses = [ours.loss_and_metrics(batch)[0] for _ in range(2)]
    assert losses[0] != losses[1], "the policy has lost its dropout"


def test_modes_come_back_after_an_error_in_the_reference():
    ours = FusedDPO(gpt2_with_lora())
    before = [module.training for module in ours.model.modules()]
    batch = default_collate(pairs(2))
    inputs = _chosen_then_rejected(batch)
    with pytest.raises(IndexError):
        ours._reference_logps(batch, inputs | {"input_ids": torch.full_like(inputs["input_ids"], V)})
    assert [module.training for module in ours.model.modules()] == before


@pytest.mark.parametrize("change", ["missing column", "fewer rejected"])
def test_a_batch_that_cannot_be_used(change):
    batch = default_collate(pairs(2))
    if change == "missing column":
        del batch["rejected_labels"]
        expected = "the batch has no 'rejected_labels', only"
    else:
        batch |= {name: column[:1] for name, column in batch.items() if name.startswith("rejected")}
        expected = "as many chosen as rejected, got 2 and 1"
    with pytest.raises(ValueError, match=expected):
        fused_dpo().loss_and_metrics(batch)
