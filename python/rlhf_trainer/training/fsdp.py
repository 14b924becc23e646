"""Sharded training (FSDP2): each process holds a part of every weight, of its gradient and of the optimizer's state.

Models are loaded in every process as they were saved, which maps their files and copies nothing, and cut block by
block; what trains in fp32 is cast when it is cut. A block is whole only while it computes.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.modeling import get_non_persistent_buffers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import UsageError


@functools.cache
def sharding() -> FullyShardedDataParallelPlugin | None:
    """What the launcher says of FSDP (`accelerate launch`, or ACCELERATE_USE_FSDP beside torchrun); None: whole models
    in every process. Read once: transformers, who sees it, would leave all weights to the first process."""
    wanted = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not wanted or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError(f"FSDP: expected fsdp_version 2 (FSDP_VERSION=2), got {plugin.fsdp_version}")
    return plugin


def place(module: nn.Module, accelerator: Accelerator, *, bf16: bool, dtype: str | None = None) -> nn.Module:
    """Puts the module on its device: whole or, where sharding is wanted, this process's part of it, cut block by block;
    the rest (embeddings, norms, heads) is one more part. With `bf16` weights travel in bf16, and gradients in fp32. Of
    a module that trains sharded, fp32 weights are made when they are cut: `dtype` float32."""
    plugin, device = sharding(), accelerator.device.type
    if plugin is None or isinstance(module, FSDPModule):
        return module.to(accelerator.device)
    warnings.filterwarnings("ignore", r".* returned a view tensor\. An in-place op")  # of which there is none
    options: dict[str, Any] = {"mesh": init_device_mesh(device, (accelerator.num_processes,))}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for block in blocks_of(module, plugin.transformer_cls_names_to_wrap):
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(module, **options)  # stays whole from forward to backward, where it is needed next
    return module.float() if dtype == "float32" else module


def blocks_of(module: nn.Module, names: list[str] | None) -> list[nn.Module]:
    """The modules of the classes `names`, or of those that transformers keeps on one device."""
    wanted = set(names or ()) or {
        name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()
    }
    blocks = [part for part in module.modules() if type(part).__name__ in wanted]
    if not blocks:
        raise UsageError(
            f"FSDP: the model has no blocks to shard ({', '.join(sorted(wanted)) or 'it names none'}); name their "
            "class as fsdp_transformer_layer_cls_to_wrap"
        )
    return blocks


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Whole weights in every process, within the block: for calls that are not the module's own, such as generation,
    in which the processes need not keep in step."""
    root, *others = [part for part in module.modules() if isinstance(part, FSDPModule)] or [None]
    if root is None:
        yield
        return
    root._get_fsdp_state()._lazy_init()  # or the first block that is called would be taken for the root
    for part in (root, *others):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in others:
            part.set_reshard_after_forward(sharding().reshard_after_forward, recurse=False)
        for part in (root, *others):
            part.reshard()
        # A backward pass fetches ahead what ran before: calls that this process alone has made must not count.
        root._get_fsdp_state()._comm_ctx.post_forward_order.clear()


def reshard(module: nn.Module) -> None:
    """Leaves each process its part of every weight; a forward pass without a backward one leaves some whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def state_within(module: nn.Module) -> dict[str, Tensor] | None:
    """Whole weights and buffers by name, within `unsharded`, where `state_dict` would cut them again; None of a module
    that isn't sharded, whose `state_dict` will do."""
    if not any(isinstance(part, FSDPModule) for part in module.modules()):
        return None
    left_out = get_non_persistent_buffers(module, recurse=True, fqns=True)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in tensors if name not in left_out}


def saved_dtype(module: nn.Module, config: Any) -> torch.dtype | None:
    """That in which a run's result is saved: the configuration's, or that in which the model was saved before."""
    if config.dtype not in (None, "auto"):
        return getattr(torch, config.dtype)
    return next((part._saved_dtype for part in module.modules() if hasattr(part, "_saved_dtype")), None)


def gather(module: nn.Module, accelerator: Accelerator, dtype: torch.dtype | None) -> None:
    """Puts whole weights in the place of the shards, weight by weight, in `dtype` or as they are, on the main process's
    CPU, and nothing in the others: the end of training."""
    reshard(module)
    gathered: dict[DTensor, nn.Parameter] = {}  # tied ones once
    for part in module.modules():
        for name, weight in part._parameters.items():
            if isinstance(weight, DTensor):
                if weight not in gathered:
                    full = whole(weight.detach())
                    kept = full.to("cpu", dtype) if accelerator.is_main_process else full.new_empty(0)
                    gathered[weight] = nn.Parameter(kept, weight.requires_grad)
                part._parameters[name] = gathered[weight]
    for part in module.modules():
        if isinstance(part, FSDPModule):  # which `fully_shard` mixed into its class
            part.__class__ = next(cls for cls in type(part).__bases__ if cls is not FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which is all of one that isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
