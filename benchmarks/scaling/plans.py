"""What DPO of Llama 3 70B takes of each H200, by `--dry_run`: no weights, and no GPU, are needed for it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report.formatting import grid
from benchmarks.steps.inputs import Sizes, make_pairs, make_tokenizer

H200_BYTES = 141e9
TOKENS = 1024  # of a prompt, and of each response
WAYS = {
    "all weights in fp32, AdamW": {"optim": "adamw_torch_fused"},
    "all weights in fp32, eight-bit AdamW": {"optim": "adamw_torch_8bit"},
    "LoRA, r 16, all linear layers": {"use_peft": True, "lora_target_modules": ["all-linear"]},
}


def make_folder(folder: Path) -> None:
    """The configuration of Llama 3 70B, and a tokenizer of as many words."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer(folder, 128256)


def plan_table() -> list[str]:
    from rlhf_trainer.commands import COMMANDS, load
    from rlhf_trainer.inspection import read
    from rlhf_trainer.offline.config import DPOConfig
    from rlhf_trainer.planning import plan_of

    lines = []
    with TemporaryDirectory() as work:
        folder, data = Path(work) / "llama", Path(work) / "pairs.jsonl"
        make_folder(folder)
        make_pairs(data, Sizes(batch=1, tokens=TOKENS, steps=64))
        for way, options in WAYS.items():
            config = DPOConfig(
                model_name_or_path=str(folder), dataset_name=str(data), output_dir="out", batch_size=64,
                micro_batch_size=1, max_prompt_length=TOKENS, max_length=2 * TOKENS, gradient_checkpointing=True,
                workspace_mib=256, dry_run_processes=8, bf16=True, **options,
            )  # fmt: skip
            _, shape, of_eight = plan_of(config, read(config, load(COMMANDS["dpo"].reader))[0].examples)
            for processes in (8, 64):
                plan = of_eight._replace(processes=processes, accumulates=shape.micro_batches > processes)
                sizes = [plan.part(size) for size in (plan.weights, plan.gradients, plan.optimizer)]
                sizes += [plan.whole, plan.with_checkpoints, plan.scratch, plan.logits, plan.total(True)]
                fits = "yes" if sizes[-1] < 0.9 * H200_BYTES else "no"
                lines.append([way, str(processes), *(f"{size / 2**30:.1f}" for size in sizes), fits])
    head = "what trains, GPUs, weights, gradients, optimizer, whole at a time, activations, losses' scratch, "
    head += "logits not made, at most at once, fits"
    return grid(head.split(", "), lines)
