"""Run by test_wrappers.py in two and in four processes: three steps under DeepSpeed's ZeRO, on the CPU."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from rlhf_kernels.integrations.transformers import lm_head_of, logit_options_of, patch_causal_lm
from tests.integrations.three_steps import (
    OPTIMIZERS,
    Make,
    Run,
    Trained,
    batches,
    compare_runs,
    head_lora,
    llama,
    loss_of,
    message_of,
    micro_batches,
    plain_name,
    report,
    snapshot,
    tied,
    trainable,
    trunk_lora,
)

Results = dict[str, Any]


class Wrapping(NamedTuple):
    """`model` makes it, `patch` patches it, ZeRO's `stage` shards it."""

    stage: int
    model: Make = llama
    patch: Callable[[Any], Any] = patch_causal_lm
    micros: int = 1


def config(stage: int, micros: int = 1) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # tells the engine how many micro-batches there are, no more
        "gradient_accumulation_steps": micros,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        # Stage 3 would keep parameters as small as these whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def train(engine: Any, run: Run) -> Trained:
    losses = []
    for whole in batches():
        total = 0.0
        for batch in micro_batches(whole, run.micros):
            value = loss_of(engine, batch, whole, run, dist.get_world_size())
            engine.backward(value * run.micros)  # it divides by their number
            engine.step()  # does something after the last one alone
            total += value.item()
        losses.append(total)
    return Trained(losses, whole_parameters(engine.module))


def whole_parameters(model: Any) -> dict[str, Any]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {plain_name(name): value for name, value in snapshot(model).items()}


def compare(wrapping: Wrapping) -> Results:
    def trained(model: Any, run: Run) -> Trained:
        engine = initialized(wrapping.patch(model), wrapping, run)
        results = train(engine, run)
        engine.destroy()
        return results

    return compare_runs(wrapping.model, wrapping.micros, trained)


def initialized(model: Any, wrapping: Wrapping, run: Run) -> Any:
    optimizer = OPTIMIZERS[run.optimizer](trainable(model))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config(wrapping.stage, run.micros))[0]


def born_sharded(plain: Any) -> Any:
    """The same model, loaded from files by transformers under zero.Init, so that no rank ever has the whole of it."""
    folder = Path(sys.argv[1]).with_name(type(plain).__name__)
    if dist.get_rank() == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    alive = HfDeepSpeedConfig(config(3))  # transformers looks whether there is one
    model = type(plain).from_pretrained(folder)
    del alive
    dist.barrier()  # before the next one is saved there
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


def born_sharded_and_patched(plain: Any) -> Any:
    options = logit_options_of(plain)  # as a small model of the same class would give
    return patch_causal_lm(born_sharded(plain), logit_options=options)


def asked_before_weights_are_there() -> Results:
    model = born_sharded(llama())
    return {"message": message_of(ValueError, lambda: patch_causal_lm(model))}


def head_outside() -> Results:
    engine = initialized(llama(), Wrapping(3), Run("sft", "sgd"))
    message = message_of(ValueError, lambda: lm_head_of(engine.module))
    engine.destroy()
    return {"message": message}


EQUAL = {
    "ZeRO-1": Wrapping(1),
    "ZeRO-2": Wrapping(2),
    "ZeRO-3": Wrapping(3),
    "ZeRO-3, two micro-batches": Wrapping(3, micros=2),
    "ZeRO-3, tied": Wrapping(3, tied),
    "ZeRO-3, LoRA": Wrapping(3, trunk_lora),
    "ZeRO-3, LoRA on the head": Wrapping(3, head_lora),
    "ZeRO-3, zero.Init": Wrapping(3, patch=born_sharded_and_patched),
    "ZeRO-3, zero.Init, tied": Wrapping(3, tied, born_sharded_and_patched),
}
REFUSED = {
    "ZeRO-3, head read outside": head_outside,
    "ZeRO-3, asked before weights are there": asked_before_weights_are_there,
}


def main() -> None:
    # A compiled op that serves inference alone; without this DeepSpeed would compile it now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    equal = {name: functools.partial(compare, wrapping) for name, wrapping in EQUAL.items()}
    report({"equal": equal, "refused": REFUSED})


if __name__ == "__main__":
    main()
