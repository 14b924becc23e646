"""`--dry_run`: what the plan counts is what a run holds."""

import re

import pytest
import torch

from rlhf_trainer import planning
from rlhf_trainer.cli import main
from rlhf_trainer.data.examples import TokenSequence
from rlhf_trainer.models.loading import load_causal_lm, loading_of
from rlhf_trainer.models.lora import leave_inputs, train_adapter
from rlhf_trainer.offline.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_trainer.training.optimizers import make_optimizer

OPTIONS = {"dataset_name": "none", "output_dir": "never", "batch_size": 4, "micro_batch_size": 2}
ADAPTED = {"use_peft": True, "bf16": True, "lora_target_modules": ["all-linear"]}
LENGTHS = (5, 9, 30, 12, 7, 31, 8)


@pytest.fixture
def examples():
    return [TokenSequence(row, [3] * length, [True] * length) for row, length in enumerate(LENGTHS, start=1)]


def trained_model(config):
    """As a run loads it."""
    model = load_causal_lm(config.model_name_or_path, key="model", **loading_of(config, trains=True))
    if config.use_peft:
        train_adapter(model, config, "CAUSAL_LM")
    if config.bf16:
        leave_inputs(model)
    return model


@pytest.mark.parametrize("options", [{}, {"bf16": True}, ADAPTED], ids=["fp32", "autocast", "LoRA"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_bytes_are_those_of_a_step(model_folder, examples, family, options):
    config = SFTConfig(model_name_or_path=str(model_folder(family)), **OPTIONS, **options)
    _, shape, plan = planning.plan_of(config, examples)
    assert (shape.rows, shape.width, shape.steps) == (2, 31, 2)

    model = trained_model(config)
    for part in model.modules():
        part.training = getattr(part, "drops_in_updates", False)
    ids = torch.randint(3, 300, (shape.rows, shape.width))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    assert plan.activations == planning.bytes_kept(model, ids, mask, config.bf16)
    optimizer = make_optimizer(config, model)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    weights = list(model.parameters())
    assert plan.weights == sum(weight.nbytes for weight in weights)
    assert plan.gradients == sum(weight.grad.nbytes for weight in weights if weight.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert plan.optimizer == sum(state.nbytes for state in states)


def test_checkpoints_keep_what_is_between_layers(model_folder, make_model, examples, tmp_path):
    """Of eight layers one at a time is computed again."""
    make_model("llama", num_hidden_layers=8).save_pretrained(tmp_path / "deep")
    config = SFTConfig(model_name_or_path=str(tmp_path / "deep"), **OPTIONS)
    model, shape, plan = planning.plan_of(config, examples)
    layers, tokens = model.config.num_hidden_layers, shape.rows * shape.width
    between = 4 * layers * tokens * model.config.hidden_size
    assert between < plan.with_checkpoints < between + plan.activations / 5
    begin = plan.scratch + plan.head + plan.gradients  # of the second micro-batch
    always = plan.weights + plan.optimizer
    assert plan.total(False) == always + max(begin + plan.activations, plan.gradients)
    assert plan.total(True) == always + max(begin + plan.with_checkpoints, plan.gradients)


def test_each_of_several_processes_holds_its_part(model_folder, examples):
    """And, whole, what is outside the blocks, and two of these."""
    options = OPTIONS | {"model_name_or_path": str(model_folder("llama"))}
    _, _, one = planning.plan_of(SFTConfig(**options), examples)
    model, _, four = planning.plan_of(SFTConfig(**options, dry_run_processes=4, bf16=True), examples)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    outside = sum(weight.numel() for weight in model.parameters()) - model.config.num_hidden_layers * layer
    assert four.whole == 2 * (outside + 2 * layer) and one.whole == 0
    assert four.part(four.weights) == one.weights // 4 and one.part(one.weights) == one.weights
    begin = four.scratch + four.head + four.activations  # two micro-batches are no more than processes
    assert not four.accumulates
    cut = (four.weights + four.optimizer) // 4
    assert four.total(False) == cut + four.whole + max(begin, four.gradients // 4 + four.tied)


def test_processes_that_share_sequences_hold_a_part_of_the_activations(model_folder, examples):
    options = OPTIONS | {"model_name_or_path": str(model_folder("llama"))}
    _, whole, one = planning.plan_of(SFTConfig(**options), examples)
    _, shape, two = planning.plan_of(SFTConfig(**options, dry_run_processes=2, sp_size=2), examples)
    assert (shape.rows, shape.width, shape.tokens_a_step) == (2, 16, whole.tokens_a_step)
    assert two.logits == one.logits * 16 // 31
    assert 0.4 < two.activations / one.activations < 0.6
    assert one.accumulates and two.accumulates


@pytest.mark.parametrize(("config", "logits"), [(DPOConfig, 2 * 4 * 397), (RewardConfig, 0)])
def test_pairs_go_through_the_model_together(model_folder, write_jsonl, config, logits):
    row = {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"}
    data = write_jsonl([row] * 6)
    options = OPTIONS | {"dataset_name": data, "model_name_or_path": str(model_folder("llama"))}
    config = config(**options)
    examples = planning.read(config, planning.load(planning.COMMANDS["dpo"].reader))[0].examples
    _, shape, plan = planning.plan_of(config, examples)
    assert (shape.rows, shape.width, shape.steps) == (4, examples[0].length, 2)
    assert shape.tokens_a_step == 8 * examples[0].length
    assert plan.logits == logits * shape.rows * shape.width


@pytest.mark.parametrize("flags", [[], ["--use_peft", "true", "--gradient_checkpointing", "true"]])
def test_a_plan_is_printed_and_nothing_is_made(model_folder, write_jsonl, tmp_path, capsys, flags):
    data = write_jsonl([{"prompt": "the cat", "completion": " sat"}] * 3)
    out = tmp_path / "out"
    folder = model_folder("llama")
    status = main([
        "sft", "--dry_run", "true", "--model_name_or_path", str(folder), "--dataset_name", str(data),
        "--output_dir", str(out), *flags,
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0 and not list(tmp_path.glob("out*"))
    assert re.search(r"rlhf sft: LlamaForCausalLM, [\d,]+ parameters, of which [\d,]+ train", printed)
    assert all(
        word in printed for word in ("weights", "gradients", "optimizer", "activations", "scratch", "at most at once")
    )
