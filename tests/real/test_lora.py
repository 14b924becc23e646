"""A few steps of DPO by LoRA on real models: the adapter is small, and others load and merge it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.cli import main
from tests.real.real_models import GEMMA3, PROMPTS, metrics_of, rows_of

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]

TURNS = (  # of tokens that Gemma has
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def words_of(model, work, flags=""):
    """Those of three steps on one pair; results are in `work`/out."""
    (work / "turns.jinja").write_text(TURNS)
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("dpo")[:1]))
    flags += f"--dataset_name {work}/pairs.jsonl --ref_cache_dir {work}/cache "
    flags += "--use_peft --lora_target_modules all-linear --optim adamw_torch --learning_rate 1e-4 --warmup_steps 0 "
    flags += f"--batch_size 1 --micro_batch_size 1 --max_steps 3 --output_dir {work}/out --save_only_model"
    template = ["--chat_template_path", str(work / "turns.jinja")] if model is GEMMA3 else []
    return ["dpo", "--model_name_or_path", str(model.path), *template, *flags.split()]


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    work = tmp_path_factory.mktemp("lora")
    assert main(words_of(model, work)) == 0
    return work / "out"


def test_it_learns_from_its_own_base(adapter):
    first, *_, last = metrics_of(adapter)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] < 0.9 * first["loss"]


def test_it_learns_on_a_base_of_four_bits(model, tmp_path):
    package = ROOT / "build/peers/bitsandbytes-0.50.2"
    assert package.is_dir(), "make hosts"
    words = words_of(model, tmp_path, "--load_in_4bit --use_bnb_nested_quant ")
    environment = os.environ | {"PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-m", "rlhf_trainer", *words], check=True, env=environment, timeout=900)
    first, *_, last = metrics_of(tmp_path / "out")
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
