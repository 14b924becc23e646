"""linear_kl and kl_penalty through the compiled ops. The kernels, and kl_penalty's autograd, are in csrc/kl."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, _ops, _workspace
from .._logits import Side
from .autograd import Arguments, differentiable_twice, fake_penalty, register_linear_kl


def linear_kl(policy: Side, ref: Side, mask: Tensor, direction: str) -> Tensor:
    """Same contract as `reference.linear_kl`."""
    hidden, weight, bias = policy.tensors()
    _ops.refuse_forward_mode("linear_kl", hidden, weight, bias)
    kept, (vocab, width) = 0, weight.shape
    if _ops.needs_gradient(hidden, weight, bias):
        kept = _workspace.logits_to_keep(hidden.shape[0], vocab, width, hidden.device, ref.head.weight.shape[1])
    kl, _stats, _cache = forward_op(*_ops.flat(Arguments.of(policy, ref, mask, direction == "policy_ref", kept)))
    return kl


if _extension.native_available():
    register_linear_kl("linear_kl", "linear_kl_backward")
    _ops.register_shapes("kl_penalty", "kl_penalty_backward", fake_penalty, fake_penalty)
    forward_op = torch.ops.rlhf_kernels.linear_kl
    backward_op = torch.ops.rlhf_kernels.linear_kl_backward
    kl_penalty = differentiable_twice(torch.ops.rlhf_kernels.kl_penalty.default)
