"""OpenRLHF's Actor and losses from build/peers, on a machine without its GPU-only packages.

Its modules import flash_attn and deepspeed at once. What stands in for them here, while they are imported:

    flash_attn.bert_padding         four functions that move padding, written here in plain torch
    flash_attn.utils.distributed    all_gather, whose backward sums: the same
    deepspeed                       utils.set_z3_leaf_modules, which matters to ZeRO-3: does nothing. The real one if
                                    installed

Attention is transformers' own (sdpa). openrlhf.utils's __init__ is passed over, as it imports what nothing here uses.
"""

import contextlib
import importlib.util
import sys
from types import ModuleType

import peft  # noqa: F401  the real packages look for flash_attn and deepspeed when they are imported: before
import torch
import torch.distributed as dist
import transformers.integrations.deepspeed
import transformers.modeling_flash_attention_utils  # noqa: F401

from benchmarks.harness import overlays


def unpad_input(rows, mask):
    """[B, T, ...] -> [N, ...], where N tokens are not masked, their indices, and their rows' boundaries."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return rows.flatten(0, 1)[indices], indices, boundaries, int(lengths.max()), lengths


def pad_input(tokens, indices, batch, length):
    padded = tokens.new_zeros(batch * length, *tokens.shape[1:])
    return padded.index_copy(0, indices, tokens).unflatten(0, (batch, length))


def rearrange(rows, pattern):
    assert pattern == "b s ... -> (b s) ..."
    return rows.flatten(0, 1)


class AllGather(torch.autograd.Function):
    """[N, ...] of each rank -> [ranks * N, ...] on each; a gradient is the sum of what the ranks have for it."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def stand_ins():
    padding = {"index_first_axis": lambda rows, indices: rows[indices], "pad_input": pad_input}
    contents = {
        "flash_attn": {},
        "flash_attn.bert_padding": {**padding, "rearrange": rearrange, "unpad_input": unpad_input},
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": AllGather.apply},
    }
    if importlib.util.find_spec("deepspeed") is None:
        contents["deepspeed"] = {
            "utils": type("utils", (), {"set_z3_leaf_modules": staticmethod(lambda model, classes: None)})
        }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
    return made


@contextlib.contextmanager
def stand_ins_for_gpu_only_packages():
    assert importlib.util.find_spec("flash_attn") is None, "the real one is here: leave the stand-in out"
    made = stand_ins()
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def load(module):
    """openrlhf.<module>"""
    overlays.without_init("openrlhf", "utils.utils")
    with stand_ins_for_gpu_only_packages():
        return overlays.without_init("openrlhf", module)
