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
from tests.real.real_models import GEMMA3, PROMPTS, assistant, metrics_of, rows_of, user

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


def test_processes_that_share_sequences_learn_as_one(model, tmp_path):
    """As many as its heads let; longer than Gemma's sliding windows of 512 tokens."""
    processes = 2 if model is GEMMA3 else 3
    row = {"messages": [user("Count."), assistant(" ".join(str(number) for number in range(200)))]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = f"--dataset_name {tmp_path}/rows.jsonl --max_steps 2 --batch_size 1 --max_length 900 --use_peft "
    flags += "--dtype float32 --lora_dropout 0 --lr_scheduler_type constant --learning_rate 1e-2 "
    flags += "--adam_epsilon 1e-3"  # so that an update follows its gradient, not the sign of noise
    template = ["--chat_template_path", str(tmp_path / "turns.jinja")] if model is GEMMA3 else []
    (tmp_path / "turns.jinja").write_text(TURNS)
    words = ["sft", "--model_name_or_path", str(model.path), *template, *flags.split()]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "rlhf_trainer"]
    shared = ["--sp_size", str(processes), "--output_dir", str(tmp_path / "shared")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *words, *shared], check=True, env=environment, timeout=900)
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "shared"), strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
