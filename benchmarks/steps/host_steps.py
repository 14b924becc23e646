"""`python -m benchmarks.steps.host_steps [--out FILE]`: steps of other trainers, fused and not, by turns.

TRL's DPOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer; Hugging Face's Trainer; DPO as a Lightning module. For another
version of TRL put its folder first: `PYTHONPATH=build/peers/trl-1.13.0 python -m benchmarks.steps.host_steps`.

A step is the loss of one prepared batch, its backward and an update by SGD; what a trainer generates or precomputes is
not in it. The host's own and the fused one take turns, the order changing, and a ratio is of two steps of one turn:
below 1 the fused one is faster. peak_mib is the most that a step of each, in a fresh process, adds to what was there
before, gradients among it. Linux only, as it reads VmHWM.
"""

from __future__ import annotations

import abc
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.record import ROOT, Results, environment
from benchmarks.steps.step_parts import new_mark_mib, status_mib

TRL = ("DPO", "SFT", "GRPO", "RLOO")
HOSTS = (*TRL, "Trainer", "Lightning")
VOCABULARY = 32768
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512, "initializer_range": 0.05,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIDES = ("chosen", "rejected")
ROWS, PROMPT, COMPLETION = 4, 32, 64  # of a batch, and tokens of each; DPO: as many pairs, half of them


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_rows(kind: str) -> Any:
    from datasets import Dataset

    def text(first: int, count: int) -> str:
        return " ".join(f"w{3 + (first + 97 * i) % (VOCABULARY - 3)}" for i in range(count))

    rows = []
    for i in range(ROWS):
        prompt, responses = text(i, PROMPT), [" " + text(1000 * j + i, COMPLETION - 1) for j in (1, 2)]
        if kind == "DPO":
            rows.append({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]})
        else:
            rows.append({"prompt": prompt, "completion": responses[0]} if kind == "SFT" else {"prompt": prompt})
    return Dataset.from_list(rows[: ROWS // 2] if kind == "DPO" else rows)


class Steps(abc.ABC):
    """A model, an optimizer and a batch; `run()` is one step, in seconds."""

    model: Any
    optimizer: torch.optim.Optimizer

    @abc.abstractmethod
    def loss(self) -> torch.Tensor:
        """Of the batch, scalar."""

    def run(self) -> tuple[float, float]:
        """(seconds, loss)"""
        start = time.perf_counter()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start, loss.item()


class TRLSteps(Steps):
    def __init__(self, kind: str, fuse: bool, folder: str) -> None:
        import trl
        from transformers import LlamaConfig, LlamaForCausalLM

        from rlhf_kernels.integrations.trl import fused

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
        options: dict[str, Any] = {
            "DPO": {"max_length": PROMPT + COMPLETION},
            "SFT": {"max_length": PROMPT + COMPLETION, "completion_only_loss": True},
        }.get(kind, {"max_completion_length": COMPLETION, "num_generations": 2, "temperature": 0.9, "beta": 0.0})
        passed: dict[str, Any] = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
        if kind == "DPO":
            passed = {"ref_model": LlamaForCausalLM(LlamaConfig(**MODEL))}
        elif kind == "SFT":
            passed = {}
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder, per_device_train_batch_size=ROWS, max_steps=1, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=1e-4,
            **options,
        )  # fmt: skip
        cls = getattr(trl, f"{kind}Trainer")
        self.trainer = (fused(cls) if fuse else cls)(
            model=model, args=args, train_dataset=make_rows(kind), processing_class=make_tokenizer(), **passed
        )
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()
        self.batch = self._batch(kind)

    def _batch(self, kind: str) -> dict[str, Any]:
        if kind in ("DPO", "SFT"):
            return next(iter(self.trainer.get_train_dataloader()))
        # What GRPO and RLOO make of generated completions; of random ones, so that both have the same.
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCABULARY, (ROWS, PROMPT + COMPLETION), generator=generator)
        batch = {
            "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
            "completion_ids": ids[:, PROMPT:], "completion_mask": torch.ones_like(ids[:, PROMPT:]),
            "advantages": torch.tensor([1.0, -1.0] * (ROWS // 2)),
            "num_items_in_batch": torch.tensor(ROWS * COMPLETION),
        }  # fmt: skip
        if kind == "RLOO":
            batch["old_logps"] = torch.full((ROWS,), -10.0 * COMPLETION)
        return batch

    def loss(self) -> torch.Tensor:
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, dict(self.batch))


def padded_batch(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class TrainerSteps(Steps):
    """Hugging Face's Trainer, which takes the model's own loss, patched or not."""

    def __init__(self, fuse: bool, folder: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

        from rlhf_kernels.integrations.transformers import patch_causal_lm

        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL))
        if fuse:
            patch_causal_lm(self.model)
        self.trainer = Trainer(self.model, TrainingArguments(folder, use_cpu=True, report_to=[]))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.batch = padded_batch(ROWS)

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.model, dict(self.batch))


class LightningSteps(Steps):
    """DPO as a module's training_step: the mixin's, or log_softmax of the model's logits."""

    def __init__(self, fuse: bool) -> None:
        import lightning
        from transformers import LlamaConfig, LlamaForCausalLM

        from rlhf_kernels.integrations.lightning import FusedDPOMixin
        from rlhf_kernels.integrations.transformers import patch_causal_lm

        def logprobs_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            return (picked * (targets != -100)).sum(-1)

        class Plain(lightning.LightningModule):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                sides = {name: torch.cat([batch[f"{side}_{name}"] for side in SIDES]) for name in padded_batch(1)}
                with torch.no_grad():
                    reference = logprobs_of(self.ref_model, sides)
                chosen, rejected = (logprobs_of(self.model, sides) - reference).chunk(2)
                return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

        class Fused(FusedDPOMixin, lightning.LightningModule):
            pass

        torch.manual_seed(0)
        self.module = Fused() if fuse else Plain()
        models = [LlamaForCausalLM(LlamaConfig(**MODEL)) for _ in range(2)]
        self.module.model, self.module.ref_model = map(patch_causal_lm, models) if fuse else models
        self.module.ref_model.requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.module.model.parameters(), lr=1e-4)
        rows = padded_batch(ROWS)
        halves = {name: column.chunk(2) for name, column in rows.items()}
        self.batch = {f"{side}_{name}": halves[name][i] for name in rows for i, side in enumerate(SIDES)}

    def loss(self) -> torch.Tensor:
        return self.module.training_step(self.batch, 0)


def steps_of(host: str, fuse: bool, folder: str) -> Steps:
    if host in TRL:
        return TRLSteps(host, fuse, folder)
    return TrainerSteps(fuse, folder) if host == "Trainer" else LightningSteps(fuse)


def peak_mib(host: str, fuse: bool, folder: str) -> float:
    """Of a process of its own."""
    steps = steps_of(host, fuse, folder)
    before = new_mark_mib()
    steps.run()
    return status_mib("VmHWM") - before


def measure(host: str, turns: int, folder: str) -> dict[str, Any]:
    both = {"host": steps_of(host, False, folder), "fused": steps_of(host, True, folder)}
    losses = {name: steps.run()[1] for name, steps in both.items()}
    difference = abs(losses["fused"] - losses["host"])
    if difference > 1e-4 * max(1.0, abs(losses["host"])):
        raise RuntimeError(f"{host}: the first losses differ, {losses}: times of something else are of no use")
    times: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(turns):  # the first of all, the warm-up, is that of the losses
        for name in list(both)[:: 1 if turn % 2 else -1]:
            times[name].append(both[name].run()[0])
    ratios = [ours / theirs for ours, theirs in zip(times["fused"], times["host"], strict=True)]
    peaks = {}
    for name in both:
        command = [sys.executable, "-m", "benchmarks.steps.host_steps", "--peak", f"{host},{name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
        peaks[name] = float(done.stdout.split()[-1])
    return {
        "host": host, "turns": turns, "loss_difference": difference,
        "ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "fused_over_host": {
            "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
        },
        "peak_mib": peaks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON, with machine, versions and commit")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # of one host, for the process that measures
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            host, name = options.peak.split(",")
            print(peak_mib(host, name == "fused", folder))
            return
        import lightning
        import trl

        head = environment(torch.device("cpu"))
        head["versions"] |= {"trl": trl.__version__, "lightning": lightning.__version__}
        sizes = {"model": MODEL, "rows": ROWS, "prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
        results = Results(options.out, head | {"sizes": sizes}) if options.out else None
        print(f"TRL {trl.__version__}   {'own ms':>9} {'fused ms':>9} {'fused/own (min to max)':>24} {'peak MiB':>16}")
        for host in options.hosts:
            row = measure(host, options.turns, folder)
            ratio, peak = row["fused_over_host"], row["peak_mib"]
            print(
                f"{host:12} {row['ms']['host']:9.1f} {row['ms']['fused']:9.1f} {ratio['median']:9.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f}) {peak['host']:7.0f} {peak['fused']:7.0f}"
            )
            if results is not None:
                results.add(row)


if __name__ == "__main__":
    main()
