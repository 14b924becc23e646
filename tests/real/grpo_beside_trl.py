"""`python -m tests.real.grpo_beside_trl`: GRPO by LoRA on the real models, by `rlhf grpo` and by TRL's GRPOTrainer.

The same prompts, adapters, optimizer and reward, and the first 8 tokens of what would be long answers; each run in
a process of its own, in turns. Prints a row a model: seconds of a step (generation, rewards, update; the median without
the first) and the peak beside what Python and its packages take. `--output` names a file for them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from rlhf_trainer.studies.machine import environment
from tests.real.real_models import GEMMA3, SMOLLM2, user

QUESTIONS = tuple(f"Write a long story about {it}." for it in ("a fox", "the sea", "two old friends", "a train"))
TOKENS, STEPS, GROUP, BATCH = 8, 3, 4, 8


def vowels(completions, **_):
    """The share of vowels in the text."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]


def by_rlhf(model: str, rows: Path, folder: Path) -> list[float]:
    from rlhf_trainer.online.config import GRPOConfig
    from rlhf_trainer.online.grpo import train_grpo

    folder = train_grpo(GRPOConfig(
        model_name_or_path=model, dataset_name=str(rows), output_dir=str(folder), reward_funcs=[f"{__name__}:vowels"],
        max_steps=STEPS, batch_size=BATCH, micro_batch_size=BATCH, per_device_generation_batch_size=BATCH,
        num_generations=GROUP, max_completion_length=TOKENS, beta=0.0, learning_rate=1e-5,
        use_peft=True, lora_target_modules=["all-linear"], lora_dropout=0.0, inspect_rows=0, save_only_model=True,
        lr_scheduler_type="constant", save_steps=STEPS + 1,
    ))  # fmt: skip
    return [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_trl(model: str, rows: Path, folder: Path) -> list[float]:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_generations=GROUP, max_steps=STEPS,
        max_completion_length=TOKENS, beta=0.0, learning_rate=1e-5,
        lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, save_strategy="no", model_init_kwargs={"dtype": "bfloat16"}, optim="adamw_torch_fused",
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    data = load_dataset("json", data_files=str(rows), split="train")
    trainer = GRPOTrainer(model, vowels, args=args, train_dataset=data, peft_config=lora)
    trainer.train()
    return [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]


TRAINERS = {"rlhf": by_rlhf, "TRL": by_trl}


def one(trainer: str, model: str, rows: Path, folder: Path) -> None:
    """A run in this process: prints its steps' seconds and its peak in MiB."""
    import torch
    import transformers  # noqa: F401 (counted among what packages take)

    torch.ones(64, 64).matmul(torch.ones(64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = TRAINERS[trainer](model, rows, folder)
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print("\n" + json.dumps({"seconds": seconds, "peak_mib": peak_mib}))


def compare(model, turns: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prompts = QUESTIONS if model is GEMMA3 else [[user(question)] for question in QUESTIONS]
        (work / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        seconds, peaks = {t: [] for t in TRAINERS}, {t: [] for t in TRAINERS}
        for turn in range(turns):
            for trainer in sorted(TRAINERS, reverse=turn % 2 == 1):
                words = [trainer, str(model.path), str(work / "rows.jsonl"), str(work / f"{trainer}{turn}")]
                run = [sys.executable, "-m", "tests.real.grpo_beside_trl", "--one", *words]
                done = subprocess.run(run, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr[-3000:]
                result = json.loads(done.stdout.splitlines()[-1])
                seconds[trainer] += result["seconds"][1:]
                peaks[trainer].append(result["peak_mib"])
    return {"model": model.name} | {
        f"{what}, {trainer}": round(statistics.median(values[trainer]), 2)
        for what, values in (("step_s", seconds), ("peak_mib", peaks))
        for trainer in TRAINERS
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=4)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        trainer, model, *paths = arguments.one
        one(trainer, model, *map(Path, paths))
        return
    rows = [compare(model, arguments.turns) for model in (SMOLLM2, GEMMA3)]
    facts = environment()
    facts["versions"] |= {name: version(name) for name in ("trl", "peft")}
    for row in rows:
        print(row)
    if arguments.output:
        content = facts | {"turns": arguments.turns, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
