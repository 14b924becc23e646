"""Run by test_fsdp.py in two processes, `sharded_saving.py MODEL FOLDER`: saves a sharded model, and an adapter, amid a
run, as a server wants them."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.models.fused_lm import load_policy
from rlhf_trainer.models.loading import load_codec_for
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.online.server_check import halved
from rlhf_trainer.rollouts.weight_sync import Adapter, Workers
from rlhf_trainer.training.fsdp import gather, place, saved_dtype, unsharded
from rlhf_trainer.training.metrics import make_accelerator
from rlhf_trainer.training.processes import leave_processes

model, folder = sys.argv[1], Path(sys.argv[2])
accelerator: Accelerator = make_accelerator([], folder)
tokenizer = AutoTokenizer.from_pretrained(model)
batch = pad_sequences([([5, 6, 7], [8, 9, 10]), ([1], [2, 3])], pad_id=0)
for use_peft in (False, True):
    config = DPOConfig(model_name_or_path=model, dataset_name="d", output_dir=str(folder), use_peft=use_peft)
    torch.manual_seed(0)
    policy = load_policy(config, *load_codec_for(config))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    named = policy.model.named_parameters(remove_duplicate=use_peft)  # whole, a tied head is written as well
    expected = {name: weight.detach().clone() for name, weight in named}
    place(policy, accelerator, bf16=False, dtype=config.trained_dtype)
    for _ in range(2):  # before the first pass, and between passes
        saved = folder / "saved"
        with unsharded(policy):
            if accelerator.is_main_process:
                (Adapter() if use_peft else Workers()).save(policy.model, tokenizer, saved)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            weights = load_file(saved / ("adapter_model.safetensors" if use_peft else "model.safetensors"))
            names = {name.replace(".default.", ".").removeprefix("base_model.model."): name for name in expected}
            own = {names[name.removeprefix("base_model.model.")]: weight for name, weight in weights.items()}
            wanted = {name for name in expected if not use_peft or "lora_" in name}
            assert own.keys() == wanted, own.keys() ^ wanted
            assert all(weight.equal(expected[name]) for name, weight in own.items())
        accelerator.wait_for_everyone()

        def logits(hidden, head):
            return (hidden @ head.weight.float().T.to(hidden.dtype)).sum()

        with torch.no_grad():
            once = policy(batch, logits)  # leaves some weights whole
            with halved(policy):
                assert policy(batch, logits) != once
            assert policy(batch, logits) == once
        policy(batch, logits).backward()

config = DPOConfig(model_name_or_path=model, dataset_name="d", output_dir=str(folder), dtype="bfloat16")
policy = load_policy(config, *load_codec_for(config))
expected = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
place(policy, accelerator, bf16=False, dtype="float32")
assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
gather(policy, accelerator, saved_dtype(policy, config))  # cast one by one: no fp32 copy of all is ever whole
gathered = dict(policy.named_parameters())
if accelerator.is_main_process:
    assert gathered.keys() == expected.keys() and all(gathered[n].equal(expected[n]) for n in expected)
else:
    assert not any(weight.numel() for weight in gathered.values())
accelerator.print("all weights equal")
leave_processes()
