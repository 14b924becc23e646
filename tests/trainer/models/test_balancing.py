"""The balancing loss of a mixture of experts is trained where its config asks for it, as transformers computes it."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rlhf_trainer.data.batches import IGNORED, Batch, collate_sequences, next_tokens
from rlhf_trainer.data.examples import Group, TokenSequence
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.offline.config import DPOConfig, SFTConfig
from rlhf_trainer.offline.dpo import train_dpo
from rlhf_trainer.offline.packing import collate_packed
from rlhf_trainer.offline.pair_batches import collate_groups
from rlhf_trainer.offline.sft import token_loss, train_sft
from rlhf_trainer.offline.shared_prefix import can_share, collate_shared
from rlhf_trainer.training.task import LossOutput, with_aux_loss

OPTIONS = {
    "vocab_size": 397, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7,
    "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16},
}


@pytest.fixture(params=FAMILIES)
def make_experts(request):
    def make(output_router_logits=True):
        config = getattr(transformers, request.param)(
            **OPTIONS, **FAMILIES[request.param], output_router_logits=output_router_logits
        )
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


def sequences(*lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 397, (length,), generator=generator).tolist() for length in lengths]
    return [TokenSequence(row, row_ids, [True] * len(row_ids)) for row, row_ids in enumerate(ids, start=1)]


def aux_loss_of(fused, batch):
    fused(batch, lambda hidden, head: None)
    return fused.aux_loss.item()


def test_loss_and_gradient_are_those_of_transformers_with_labels(make_experts):
    """On a padded batch: padding is not routed evenly, and must not count."""
    batch, model, theirs = collate_sequences(sequences(5, 19, 11), pad_id=1), make_experts(), make_experts()
    fused = FusedLM(model)
    targets = next_tokens(batch.labels)
    count = (targets != IGNORED).sum()
    loss, metrics = fused(batch, lambda hidden, head: token_loss(hidden, head, targets, count))
    output = with_aux_loss(LossOutput(loss, metrics, torch.tensor(35.0)), [fused])
    output.loss.backward()
    expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    expected.loss.backward()
    assert output.metrics["aux_loss"].item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    assert output.metrics["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (output.loss - loss).item() > 0.5  # or equality would show little
    for (name, weight), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            weight.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_padding_behind_packed_rows_does_not_count(make_experts):
    """Rows of one conversation each route as the padded batch of them does."""
    fused, data = FusedLM(make_experts()), sequences(5, 19, 11)
    expected = aux_loss_of(fused, collate_sequences(data, pad_id=1))
    assert aux_loss_of(fused, collate_packed([[one] for one in data], pad_id=1)) == pytest.approx(expected, rel=1e-5)
    padded = Batch(*collate_packed([[one] for one in data], pad_id=1)[:4])
    assert aux_loss_of(fused, padded) != pytest.approx(expected, rel=1e-3)


def test_a_shared_prompt_counts_once(make_experts):
    fused, (prompt, short, long) = FusedLM(make_experts()), sequences(9, 3, 8)
    assert can_share(fused.model)
    groups = [Group(i, prompt.ids, [part.ids], [(0, 0)], [0.0]) for i, part in enumerate((short, long))]
    separate = collate_groups(groups, 1).batch
    shared = collate_shared(groups, 1, "sdpa").batch
    assert aux_loss_of(fused, shared) == pytest.approx(aux_loss_of(fused, separate), rel=1e-5)
    both = collate_shared([Group(0, prompt.ids, [short.ids, long.ids], [(0, 1)], [0.0])], 1, "sdpa").batch
    assert both.real.sum() == 20 and torch.isfinite(torch.tensor(aux_loss_of(fused, both)))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_commands_train_with_it(command, make_experts, tokenizer, rows, write_jsonl, tmp_path):
    data, weights = write_jsonl(rows(8)), {}
    for wanted in (False, True):
        start = tmp_path / f"start-{wanted}"
        make_experts(wanted).save_pretrained(start)
        tokenizer.save_pretrained(start)
        options = {
            "model_name_or_path": str(start), "dataset_name": data, "output_dir": str(tmp_path / f"out-{wanted}"),
            "batch_size": 8, "micro_batch_size": 4, "max_length": 64, "learning_rate": 1e-3, "eval_dataset": data,
        }  # fmt: skip
        if command == "sft":
            folder = train_sft(SFTConfig(**options))
        else:
            dpo = {"max_prompt_length": 48, "ref_cache_dir": str(tmp_path / "cache"), "share_prefix": True}
            folder = train_dpo(DPOConfig(**options, **dpo))
        before, step = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        assert ("aux_loss" in step) == wanted
        if wanted:
            assert step["loss"] == pytest.approx(before["eval/loss"] + 0.7 * step["aux_loss"], rel=1e-4)
        weights[wanted] = load_file(folder / "model.safetensors")
        assert transformers.AutoConfig.from_pretrained(folder).output_router_logits == wanted
    routers = [name for name in weights[True] if "gate.weight" in name]
    assert routers and all(not weights[True][name].equal(weights[False][name]) for name in routers)


def test_without_it_nothing_changes(make_experts):
    fused = FusedLM(make_experts(False))
    assert fused.aux_coefficient == 0
    batch = collate_sequences(sequences(4), pad_id=1)
    assert fused(batch, lambda hidden, head: (batch.labels != IGNORED).sum().item()) == 3
