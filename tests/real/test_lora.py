"""A few steps of DPO by LoRA on real models: the adapter is small, and others load and merge it."""

import json
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import main
from tests.real.real_models import GEMMA3, PROMPTS, metrics_of, rows_of

pytestmark = pytest.mark.real

TURNS = (  # of tokens that Gemma has
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """The output folder of three steps on one pair."""
    work = tmp_path_factory.mktemp("lora")
    (work / "turns.jinja").write_text(TURNS)
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("dpo")[:1]))
    flags = f"--dataset_name {work}/pairs.jsonl --ref_cache_dir {work}/cache "
    flags += "--use_peft --lora_target_modules all-linear --optim adamw_torch --learning_rate 1e-4 --warmup_steps 0 "
    flags += f"--batch_size 1 --micro_batch_size 1 --max_steps 3 --output_dir {work}/out --save_only_model"
    template = ["--chat_template_path", str(work / "turns.jinja")] if model is GEMMA3 else []
    words = ["dpo", "--model_name_or_path", str(model.path), *template, *flags.split()]
    assert main(words) == 0
    return work / "out"


def test_it_learns_from_its_own_base(adapter):
    first, *_, last = metrics_of(adapter)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] < 0.9 * first["loss"]


@torch.no_grad()
def test_transformers_and_peft_load_it(model, adapter, tmp_path):
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert size < 0.1 * (model.path / "model.safetensors").stat().st_size
    assert {weight.dtype for weight in load_file(adapter / "adapter_model.safetensors").values()} == {torch.float32}
    assert main(["merge", "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "whole")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer.apply_chat_template(
        PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    base, by_peft, by_transformers, merged = (
        load.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).logits
        for load, folder in (
            (AutoModelForCausalLM, model.path), (AutoPeftModelForCausalLM, adapter), (AutoModelForCausalLM, adapter),
            (AutoModelForCausalLM, tmp_path / "whole"),
        )
    )  # fmt: skip
    torch.testing.assert_close(by_peft, by_transformers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft, merged, rtol=1e-3, atol=1e-3)
    assert (by_peft - base).abs().max() > 0.1


def test_a_template_of_new_tokens_is_refused(model, tmp_path, capsys):
    if model is not GEMMA3:
        pytest.skip("its template is its own")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("dpo")))
    words = f"dpo --model_name_or_path {model.path} --chat_template_path chatml --dataset_name {tmp_path}/pairs.jsonl "
    assert main([*words.split(), "--use_peft", "--output_dir", str(tmp_path / "out")]) == 2
    assert "the chat template brings tokens that the model does not embed" in capsys.readouterr().err
