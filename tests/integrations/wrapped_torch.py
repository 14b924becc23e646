"""Run by test_wrappers.py in two and in four processes: three steps under DDP, FSDP2 and accelerate."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from rlhf_kernels.integrations.transformers import (
    CausalLMLogprobs,
    LogitOptions,
    lm_head_of,
    patch_causal_lm,
)
from tests.integrations.three_steps import (
    OPTIMIZERS,
    Batch,
    Make,
    Run,
    Trained,
    batches,
    compare_runs,
    difference,
    dpo,
    head_lora,
    llama,
    loss_of,
    loss_of_logits,
    message_of,
    micro_batches,
    plain_name,
    report,
    runs,
    snapshot,
    tied,
    token_count,
    trainable,
    trunk_lora,
    truth,
)

Results = dict[str, Any]


def itself(wrapper: Any) -> Any:
    return wrapper


class Wrapping(NamedTuple):
    """`model` makes it, `wrap` patches and wraps it; `call` is what is called in place of the wrapper."""

    model: Make
    wrap: Callable[[Any], Any]
    call: Callable[[Any], Any] = itself
    micros: int = 1
    loss: Callable[..., torch.Tensor] = loss_of


def train(wrapper: Any, run: Run, call: Callable[[Any], Any], loss: Callable[..., torch.Tensor]) -> Trained:
    optimizer = OPTIMIZERS[run.optimizer](trainable(wrapper))
    losses = []
    for whole in batches():
        optimizer.zero_grad()
        total = 0.0
        for k, batch in enumerate(micro_batches(whole, run.micros)):
            with synchronised(wrapper, k == run.micros - 1):
                value = loss(call(wrapper), batch, whole, run, dist.get_world_size())
                value.backward()
            total += value.item()
        optimizer.step()
        losses.append(total)
    return Trained(losses, whole_parameters(wrapper))


@contextlib.contextmanager
def synchronised(wrapper: Any, last: bool) -> Any:
    """Gradients are synchronised in a step's last backward alone."""
    if isinstance(wrapper, DDP):
        with contextlib.nullcontext() if last else wrapper.no_sync():
            yield
    else:
        wrapper.set_requires_gradient_sync(last)
        yield


def whole_parameters(wrapper: nn.Module) -> dict[str, torch.Tensor]:
    return {
        plain_name(name): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in snapshot(wrapper).items()
    }


def compare(wrapping: Wrapping) -> Results:
    def trained(model: Any, run: Run) -> Trained:
        return train(wrapping.wrap(model), run, wrapping.call, wrapping.loss)

    return compare_runs(wrapping.model, wrapping.micros, trained)


def ddp(model: Any, **options: Any) -> DDP:
    return DDP(patch_causal_lm(model), **options)


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sharded(
    model: Any,
    patch: Callable[[Any], Any] = patch_causal_lm,
    layers: bool = True,
    head: bool = False,
    root: bool | None = None,
    mesh: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """Patched, then FSDP2: its layers, its head or neither as units of their own, and the root. `root` is whether the
    root is resharded after forward."""
    shape = mesh or (dist.get_world_size(),)
    device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicated", "sharded")[-len(shape) :])
    model = patch(model)
    units = [*(base_of(model).model.layers if layers else ()), *([model.get_output_embeddings()] if head else ())]
    for unit in units:
        fully_shard(unit, mesh=device_mesh, **options)
    return fully_shard(model, mesh=device_mesh, reshard_after_forward=root, **options)


def with_checkpoints(model: Any) -> Any:
    layers = base_of(model).model.layers
    for k, layer in enumerate(layers):
        layers[k] = checkpoint_wrapper(layer)
    return model


def with_own_checkpoints(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model.train()  # it has no dropout


def accelerated(model: Any) -> DDP:
    return Accelerator(cpu=True).prepare(patch_causal_lm(model))


def accelerate_in_bf16() -> Results:
    """Accelerate runs forward under autocast and turns what it returns into fp32."""
    AcceleratorState._reset_state(True)  # or another mixed_precision than that of the last one would be refused
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(patch_causal_lm(llama()))
    (batch,) = micro_batches(batches()[0], 1)
    out = prepared(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert isinstance(out, CausalLMLogprobs) and out.token_mask.dtype == torch.bool
    return in_bf16(lambda model, loss: accelerator.prepare(patch_causal_lm(model) if loss is loss_of else model))


def fsdp2_in_bf16(**options: Any) -> Results:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    records = set()

    def wrap(model: Any, loss: Callable[..., Any]) -> Any:
        patch = patch_causal_lm if loss is loss_of else itself
        wrapped = sharded(model, patch, mp_policy=policy, **options)
        wrapped.lm_head.register_forward_pre_hook(lambda _head, args: records.add(args[0].dtype))
        return wrapped

    results = in_bf16(wrap)
    assert records == {torch.bfloat16}, records
    return results


def in_bf16(wrap: Callable[[Any, Callable[..., Any]], Any]) -> Results:
    """The distances of the patched and the unpatched model, wrapped alike, from the fp32 run in one process."""
    results = {"difference": 0.0, "unfused": 0.0}
    for run in runs():
        model = llama()
        start, expected = snapshot(model), truth(llama, 0, run).parameters
        for name, loss in (("difference", loss_of), ("unfused", loss_of_logits)):
            wrapped = wrap(copy.deepcopy(model), loss)
            trained = train(wrapped, run, itself, loss)
            assert {p.dtype for p in wrapped.parameters()} == {torch.float32}
            results[name] = max(results[name], difference(trained.parameters, expected, start))
    return results


def changed_in_place(wrapper: Any, batch: Batch, whole: Batch, run: Run, ranks: int) -> torch.Tensor:
    """A loss that changes log-probs, as one may. Were they views, FSDP2 would not gather what it has
    resharded for their backward."""
    out = wrapper(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    logps = out.logprobs.mul_(out.token_mask).sum(-1)
    return -logps.sum() / token_count(whole) * ranks if run.kind == "sft" else dpo(logps, batch) / run.micros


def inner(wrapper: Any) -> Any:
    """The bug that is looked for: the model is called without its wrapper, so nothing synchronises gradients."""
    return wrapper.module


def head_outside() -> Results:
    model = sharded(llama())
    return {"message": message_of(ValueError, lambda: lm_head_of(model))}


def patched_after() -> Results:
    """A model that is sharded already cannot be asked; with its options given, it need not be."""
    model = sharded(llama(), patch=itself)
    return {"message": message_of(ValueError, lambda: patch_causal_lm(model))}


def head_checkpointed() -> Results:
    model = patch_causal_lm(llama())
    model.lm_head = checkpoint_wrapper(model.lm_head)
    (batch,) = micro_batches(batches()[0], 1)
    return {"message": message_of(ValueError, lambda: DDP(model)(input_ids=batch.input_ids, labels=batch.labels))}


def sharded_then_patched(model: Any) -> Any:
    return patch_causal_lm(sharded(model, patch=itself), logit_options=LogitOptions())


partial = functools.partial
EQUAL = {
    "DDP": Wrapping(llama, ddp),
    "DDP, two micro-batches": Wrapping(llama, ddp, micros=2),
    "DDP, find_unused_parameters": Wrapping(llama, partial(ddp, find_unused_parameters=True)),
    "DDP, static_graph": Wrapping(llama, partial(ddp, static_graph=True)),
    "DDP, tied": Wrapping(tied, ddp),
    "DDP, tied, two micro-batches": Wrapping(tied, ddp, micros=2),
    "DDP, LoRA": Wrapping(trunk_lora, ddp),
    "DDP, LoRA on the head": Wrapping(head_lora, ddp),
    "DDP, transformers' checkpoints": Wrapping(llama, lambda model: ddp(with_own_checkpoints(model))),
    "accelerate": Wrapping(llama, accelerated),
    "accelerate, two micro-batches": Wrapping(llama, accelerated, micros=2),
    "FSDP2": Wrapping(llama, sharded),
    "FSDP2, two micro-batches": Wrapping(llama, sharded, micros=2),
    "FSDP2, head as a unit": Wrapping(llama, partial(sharded, head=True)),
    "FSDP2, head as a unit, two micro-batches": Wrapping(llama, partial(sharded, head=True), micros=2),
    "FSDP2, root alone": Wrapping(llama, partial(sharded, layers=False)),
    "FSDP2, root alone, resharded": Wrapping(llama, partial(sharded, layers=False, root=True)),
    "FSDP2, root resharded": Wrapping(llama, partial(sharded, root=True)),
    "FSDP2, root kept": Wrapping(llama, partial(sharded, root=False)),
    "FSDP2, head as a unit, root resharded": Wrapping(llama, partial(sharded, head=True, root=True)),
    "FSDP2, tied": Wrapping(tied, sharded),
    "FSDP2, tied, root resharded": Wrapping(tied, partial(sharded, root=True)),
    "FSDP2, LoRA": Wrapping(trunk_lora, sharded),
    "FSDP2, LoRA on the head": Wrapping(head_lora, sharded),
    "FSDP2, LoRA on the head as a unit": Wrapping(head_lora, partial(sharded, head=True)),
    "FSDP2, torch's checkpoints": Wrapping(llama, lambda model: sharded(with_checkpoints(model), head=True)),
    "FSDP2, transformers' checkpoints": Wrapping(llama, lambda model: sharded(with_own_checkpoints(model))),
    "FSDP2, log-probs changed in place": Wrapping(llama, partial(sharded, root=True), loss=changed_in_place),
    "FSDP2, patched after": Wrapping(llama, sharded_then_patched),
}
# What four ranks may do that two do not: a head whose rows they do not share out equally, a mesh, more to sum.
ON_FOUR = (
    "DDP", "DDP, tied, two micro-batches", "DDP, LoRA on the head", "accelerate", "FSDP2, two micro-batches",
    "FSDP2, head as a unit", "FSDP2, root alone, resharded", "FSDP2, tied, root resharded",
    "FSDP2, LoRA on the head as a unit", "FSDP2, log-probs changed in place",
)  # fmt: skip
ON_FOUR_ALONE = {
    "FSDP2, replicated and sharded": Wrapping(llama, partial(sharded, mesh=(2, 2), head=True)),
}
UNEQUAL = {
    "DDP, inner model called": Wrapping(llama, ddp, inner),
    "DDP, tied, inner model called": Wrapping(tied, ddp, inner),
    "accelerate, inner model called": Wrapping(llama, accelerated, inner),
}
BF16 = {
    "accelerate, bf16": accelerate_in_bf16,
    "FSDP2, bf16": fsdp2_in_bf16,
    "FSDP2, bf16, head as a unit": partial(fsdp2_in_bf16, head=True),
}
REFUSED = {
    "FSDP2, head read outside": head_outside,
    "FSDP2, patched after without options": patched_after,
    "DDP, head checkpointed": head_checkpointed,
}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    equal = EQUAL
    if dist.get_world_size() == 4:
        equal = {name: EQUAL[name] for name in ON_FOUR} | ON_FOUR_ALONE
    report({
        "equal": {name: partial(compare, wrapping) for name, wrapping in equal.items()},
        "unequal": {name: partial(compare, wrapping) for name, wrapping in UNEQUAL.items()},
        "bf16": BF16,
        "refused": REFUSED,
    })  # fmt: skip


if __name__ == "__main__":
    main()
