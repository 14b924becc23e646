"""Sequence parallelism: each process of a group holds a part of every sequence's positions, and of its activations.

Attention sees whole sequences, of a part of the heads (Jacobs et al., 2023, arXiv:2309.14509, DeepSpeed-Ulysses): two
all-to-alls, one before and one after it, turn parts of positions into parts of heads and back. All else in a
transformer goes token by token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

import rlhf_kernels as rk
from rlhf_kernels.parallel import linear_dpo_loss, sequence_logprobs

from ..data.batches import IGNORED, next_tokens
from ..errors import UsageError

ATTENTION = "sequence_parallel"  # its name among transformers' attention functions
OVER_GROUP = {rk.linear_dpo_loss: linear_dpo_loss, rk.sequence_logprobs: sequence_logprobs}
UNKNOWN = ("softcap", "s_aux", "position_bias")  # to torch's scaled_dot_product_attention


class SequenceParallel(NamedTuple):
    """The group that shares sequences, and this process's place in it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, tensor: Tensor, fill: int = 0) -> Tensor:
        """[S, T] -> this process's [S, ceil(T / size)], behind T filled up."""
        width = -(-tensor.shape[1] // self.size)
        padded = pad(tensor, (0, width * self.size - tensor.shape[1]), value=fill)
        return padded[:, self.rank * width : (self.rank + 1) * width]

    def targets(self, labels: Tensor) -> Tensor:
        """What this process's positions predict, from the labels [S, T] of all."""
        return self.part(next_tokens(labels), IGNORED)

    def exchange(self, tensor: Tensor, split: int, joined: int) -> Tensor:
        """Cuts dimension `split` over the processes, and joins what comes from each of them in dimension `joined`."""
        sent = torch.stack(tensor.chunk(self.size, split))
        received = all_to_all_single(torch.empty_like(sent), sent, group=self.group)
        return torch.cat(received.unbind(), joined)


def start_sequence_parallel(accelerator: Accelerator, size: int) -> SequenceParallel | None:
    """Groups of `size` neighbouring processes; None where each process has whole sequences."""
    if size == 1:
        return None
    groups, left_over = divmod(accelerator.num_processes, size)
    if left_over:
        raise UsageError(f"sp_size {size}: expected a multiple of it as processes, got {accelerator.num_processes}")
    mesh = init_device_mesh(accelerator.device.type, (groups, size), mesh_dim_names=("data", "sequence"))
    return SequenceParallel(mesh["sequence"].get_group(), mesh["sequence"].get_local_rank(), size)


def share_sequences(model: PreTrainedModel, sequence: SequenceParallel, key: str) -> None:
    """Has the model attend over the group; UsageError where it cannot, which a short sequence finds out."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    if heads % sequence.size:
        raise UsageError(f"sp_size {sequence.size}: expected a divisor of the {heads} attention heads of {key}")
    ids = torch.arange(1, 4 * sequence.size + 1, device=model.device)[None] % text.vocab_size
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    with torch.no_grad():
        whole = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        AttentionInterface.register(ATTENTION, functools.partial(attend, sequence))
        model.set_attn_implementation(ATTENTION)
        own = {"input_ids": sequence.part(ids), "position_ids": sequence.part(positions)}
        part = model.base_model(**own, use_cache=False).last_hidden_state
    expected = whole.chunk(sequence.size, 1)[sequence.rank].float()
    allowed = torch.finfo(part.dtype).eps ** 0.5 * expected.norm()
    wrong = (~((part.float() - expected).norm() <= allowed)).int()  # NaN is not trusted
    dist.all_reduce(wrong, group=sequence.group)
    if wrong:
        raise UsageError(
            f"sp_size {sequence.size}: {key} ({type(model).__name__}) does more than attend from token to token, or by "
            "other rules than those of causal attention, so that parts of a sequence cannot be computed apart"
        )


def over_group(
    function: Callable[..., Any], sequence: SequenceParallel | None, labels: Tensor
) -> tuple[Callable[..., Any], Tensor, dict[str, Any]]:
    """The function of rlhf_kernels, or that of its name for shared sequences, with the labels and options for it."""
    if sequence is None:
        return function, labels, {}
    return OVER_GROUP[function], sequence.targets(labels), {"shift": False, "sequence_group": sequence.group}


def attend(
    sequence: SequenceParallel, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    *, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of query [S, H, T_local, d] to key and value [S, H_kv, T_local, d] -> [S, T_local, H, d]. Rows
    are padded on the right, so that no mask is needed."""
    if wanted := [name for name in UNKNOWN if options.get(name) is not None]:
        raise UsageError(f"sp_size: the attention of {type(module).__name__} has {wanted[0]}; leave sp_size at 1")
    heads = query.shape[1]
    if key.shape[1] % sequence.size:  # fewer heads than processes
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    query, key, value = (sequence.exchange(tensor, 1, 2) for tensor in (query, key, value))
    length, mask = query.shape[2], None
    if sliding_window is not None and sliding_window < length:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = ones.tril().triu(1 - sliding_window)
    output = scaled_dot_product_attention(
        query, key, value, mask, dropout if module.training else 0.0, is_causal=mask is None, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return sequence.exchange(output, 2, 1).transpose(1, 2), None
