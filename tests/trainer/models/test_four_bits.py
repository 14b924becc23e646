"""LoRA on a base of four bits (QLoRA), by bitsandbytes, which has kernels for the CPU, too.

Skipped where the package is missing; tests/integrations/test_quantized.py runs it with the package."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
import bitsandbytes
from bitsandbytes.functional import dequantize_4bit

from rlhf_trainer import planning
from rlhf_trainer.cli import main
from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.data.examples import TokenSequence
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.fused_lm import load_policy
from rlhf_trainer.models.kl import states_of
from rlhf_trainer.models.loading import load_codec_for, save_model
from rlhf_trainer.models.lora import Reference
from rlhf_trainer.offline.config import SFTConfig
from rlhf_trainer.online.config import GRPOConfig

BATCH = pad_sequences([([5, 9, 200, 31, 7], [8, 3])], 1)
QUANTIZED = ["--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear"]


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    """Of layers that four bits fit: whole blocks of 64."""
    make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config_of(base, cls=SFTConfig, **options):
    common = {"model_name_or_path": str(base), "dataset_name": "d", "output_dir": "o", "use_peft": True}
    return cls(**common | {"load_in_4bit": True, "lora_target_modules": ["all-linear"]} | options)


def policy_of(config):
    return load_policy(config, *load_codec_for(config))


def quantized_layers(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize(
    "options", [{}, {"bnb_4bit_quant_type": "fp4"}, {"use_bnb_nested_quant": True}, {"bf16": True}]
)
def test_layers_are_four_bits_and_the_head_is_not(base, options):
    config = config_of(base, **options)
    policy = policy_of(config)
    layers = quantized_layers(policy)
    assert len(layers) == 7 * policy.model.config.num_hidden_layers
    assert policy.model.get_output_embeddings().weight.dtype == torch.bfloat16
    state = next(iter(layers.values())).weight.quant_state
    assert (state.quant_type, state.nested) == (config.bnb_4bit_quant_type, config.use_bnb_nested_quant)

    embeddings = policy.model.get_input_embeddings().weight.requires_grad_()
    hidden, _ = states_of(policy, BATCH)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, layer in layers.items():  # what the four bits stand for, in a model without bitsandbytes
        own = plain.get_parameter(name.removeprefix("model.").replace(".base_layer", "") + ".weight")
        own.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        expected = plain.base_model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).last_hidden_state
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=2e-2, atol=2e-2)

    (truth,) = torch.autograd.grad(expected.float().square().mean(), plain.get_input_embeddings().weight)
    (gradient,) = torch.autograd.grad(hidden.float().square().mean(), embeddings)
    assert (gradient - truth).norm() < 3e-2 * truth.norm()


def test_the_reference_is_the_quantized_base(base):
    policy = policy_of(config_of(base))
    before = states_of(policy, BATCH)[0]
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.3)
    assert not torch.equal(states_of(policy, BATCH)[0], before)
    assert torch.equal(states_of(Reference(policy), BATCH)[0], before)


def test_the_plan_counts_four_bits(base):
    for options in ({}, {"use_bnb_nested_quant": True}):
        config = config_of(base, **options)
        _, _, plan = planning.plan_of(config, [TokenSequence(1, [3] * 9, [True] * 9)])
        held = 0
        for weight in policy_of(config).parameters():
            state = getattr(weight, "quant_state", None)
            held += weight.nbytes
            if state is not None:
                held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        assert plan.weights == pytest.approx(held, rel=2e-3)


def test_it_trains_resumes_and_merges(base, write_jsonl, rows, tmp_path):
    data = write_jsonl(rows(8))
    words = ["sft", "--model_name_or_path", str(base), "--dataset_name", str(data), *QUANTIZED, "--batch_size", "4"]
    words += ["--learning_rate", "1e-2", "--lora_dropout", "0", "--lr_scheduler_type", "constant"]
    assert main([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([*words, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    assert main([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint"]) == 0
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert main(["merge", "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weight = merged.model.layers[0].mlp.up_proj.weight
    low, high = (resumed[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    saved = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, saved + 2 * high @ low, rtol=1e-5, atol=1e-6)  # alpha 32, r 16


def test_what_four_bits_cannot_do_is_refused(base, tmp_path, monkeypatch):
    policy = policy_of(config_of(base))
    with pytest.raises(UsageError, match=r"four-bit weights .* do not travel, but their adapter does: lora"):
        save_model(policy.model, None, tmp_path / "copy")
    monkeypatch.setattr("rlhf_trainer.models.loading.sharding", lambda: True)
    with pytest.raises(UsageError, match="FSDP does not cut four-bit weights"):
        policy_of(config_of(base, cls=GRPOConfig, reward_funcs=["exact_answer"]))
