"""linear_logprobs through the compiled ops. The kernels are in csrc/logprob."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, _ops, _workspace
from .._logits import Side
from .autograd import Arguments, frozen_arguments, register, register_frozen, results_of


def linear_logprobs(
    side: Side, targets: Tensor, ignore_index: int, outputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """Same contract as `reference.linear_logprobs`."""
    hidden, weight, bias = side.tensors()
    _ops.refuse_forward_mode("linear_logprobs", hidden, weight, bias)
    if _ops.needs_gradient(hidden) and not _ops.needs_gradient(weight, bias):
        arguments = Arguments.of(side, targets, ignore_index, outputs)
        return results_of(frozen_op(*frozen_arguments(arguments)), outputs)
    kept, (vocab, width) = 0, weight.shape
    if _ops.needs_gradient(hidden, weight, bias):
        kept = _workspace.logits_to_keep(hidden.shape[0], vocab, width, hidden.device)
    return results_of(forward_op(*_ops.flat(Arguments.of(side, targets, ignore_index, outputs, kept))), outputs)


if _extension.native_available():
    register("linear_logprobs", "linear_logprobs_backward")
    register_frozen("linear_logprobs_frozen", "linear_logprobs_frozen_backward")
    forward_op = torch.ops.rlhf_kernels.linear_logprobs
    backward_op = torch.ops.rlhf_kernels.linear_logprobs_backward
    frozen_op = torch.ops.rlhf_kernels.linear_logprobs_frozen
