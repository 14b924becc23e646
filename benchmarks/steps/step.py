"""`python -m benchmarks.steps.step --trainer rlhf|trl-1.16.0|trl-1.13.0|plain --model DIR --data FILE --out FILE`: one
trainer's DPO run in a process of its own, on the CPU. `--part gradients` measures less of it: see step_parts.py.

FILE is JSON: the time of every optimisation step, the losses, and the most memory a step took. If the trainer cannot
run here, `status` says why. Whatever the trainer, the measuring is the same, through torch's own global hooks:

- A step lasts from the end of one optimizer.step() to the end of the next, so it has everything in it that a trainer
  does for a step: batch, forward, backward, clipping, update, logging. The first `--warm-up` steps are not timed.
  step_cpu_ms is the processor time of all threads in it: on a busy machine it says more.
- Every trainer computes the reference's log-probs once, before training (TRL: precompute_ref_log_probs=True). That is
  not in the steps but in before_steps_s, with the loading of model and data, and without imports. total_s, of which it
  is a part, ends with the last update, as not all of them save a model.
- Memory counts from the first forward that has gradients, when model, data and reference log-probs are there. The
  process's high-water mark starts over there; gradients and optimizer state, which come later, are taken off it.
  Linux only: it reads, and resets, VmHWM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.steps.step_parts import Parts, new_mark_mib, status_mib
from benchmarks.steps.step_trainers import CannotRun, Run, trainer_of

END = "</s>"
LIKED = 32  # words that only chosen responses have; rejected ones have as many of their own, so the loss can fall


@dataclass
class Sizes:
    """Of the model and of its data; `tokens` is the most that a prompt, and a response, has."""

    layers: int = 2
    hidden: int = 256
    vocab: int = 32768
    batch: int = 4  # pairs of a step
    tokens: int = 96
    steps: int = 6
    intermediate: int = 0  # of the MLP; 0: twice the hidden size
    kv_heads: int = 0  # of the attention; 0: as many as it has heads of 64
    equal: bool = False  # every prompt and response as long as `tokens` allows

    def shown(self) -> dict[str, int]:
        """What is not left as it was."""
        return {name: value for name, value in asdict(self).items() if value}


def make_model(folder: Path, sizes: Sizes) -> None:
    """A random Llama and a tokenizer of as many words as its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = max(1, sizes.hidden // 64)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate or 2 * sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=heads, num_key_value_heads=sizes.kv_heads or heads,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.05,  # wider than usual: logits spread over several nats
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({END: 0} | {f"w{i}": i for i in range(1, sizes.vocab)}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END).save_pretrained(folder)


def make_data(path: Path, sizes: Sizes) -> None:
    """Pairs, as many as `sizes.steps` steps take, of unequal lengths unless `sizes.equal`; half of a response's words
    give away its side."""
    rng = random.Random(0)
    most = sizes.tokens - 1  # an end of sequence follows a response
    least = most if sizes.equal else sizes.tokens // 2

    def word(own: int) -> str:
        """Any word, or (if `own` is not 0) as often one of the `LIKED` words from `own` on."""
        if own and rng.random() < 0.5:
            return f"w{rng.randrange(own, own + LIKED)}"
        return f"w{rng.randrange(2 * LIKED + 1, sizes.vocab)}"

    def text(own: int) -> str:
        return " ".join(word(own) for _ in range(rng.randint(least, most)))

    rows = [
        {"prompt": text(0), "chosen": " " + text(1), "rejected": " " + text(1 + LIKED)}
        for _ in range(sizes.batch * sizes.steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Watch:
    """Times and memory of the steps of any trainer, from when it is made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.held_mib = self.peak_mib = self.own_mib = 0.0
        self.first_forward = register_module_forward_pre_hook(self.before_forward)
        register_optimizer_step_post_hook(self.after_step)

    def before_forward(self, _module: nn.Module, _args: tuple) -> None:
        if not torch.is_grad_enabled():
            return  # the reference's
        self.first_forward.remove()
        self.reference_s = time.perf_counter() - self.started
        self.held_mib = new_mark_mib()

    def after_step(self, optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.peak_mib = status_mib("VmHWM")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [t for p in parameters for t in optimizer.state[p].values() if torch.is_tensor(t)]
        self.own_mib = sum(tensor.nbytes for tensor in gradients + state) / 2**20

    def found(self, warm_up: int) -> dict:
        def steps_ms(ends: list[float]) -> list[float]:
            times_ms = [round(1e3 * (end - start), 2) for start, end in itertools.pairwise(ends)]
            return times_ms[max(0, warm_up - 1) :]  # the first step has no start

        return {
            "step_ms": steps_ms(self.ends),
            "step_cpu_ms": steps_ms(self.cpu_ends),
            "before_steps_s": round(self.reference_s, 2),
            "total_s": round(self.ends[-1] - self.started, 2),
            "peak_extra_mib": round(self.peak_mib - self.held_mib - self.own_mib, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name in ("--trainer", "--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, default=Sizes.batch, help="pairs of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--part", choices=("whole", "gradients"), default="whole", help="of a step")
    args = parser.parse_args()
    folder = Path(args.out).resolve().parent / f"{args.trainer}-{os.getpid()}"
    folder.mkdir()

    try:
        train = trainer_of(args.trainer)  # imports it
        watch = Watch() if args.part == "whole" else Parts()
        parts = watch if isinstance(watch, Parts) else None
        losses = train(Run(args.model, args.data, folder, args.batch, args.learning_rate, args.dtype, parts))
    except CannotRun as error:
        result = {"status": str(error)}
    else:
        result = {"status": "measured", **watch.found(args.warm_up), "losses": losses}
    Path(args.out).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
