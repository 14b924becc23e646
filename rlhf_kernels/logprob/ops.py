"""`torch.ops.rlhf_kernels.linear_logprobs`: shapes for tracing, and autograd. The kernels are in csrc/logprob.

The Triton op of triton_ops.py has the same arguments and two more, (index, masked) of `_rows.rows_to_visit`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _extension, _ops, _workspace
from .._checks import check_target_range, wrong_targets
from .._logits import LogitTransform
from .._rows import rows_to_visit
from .reference import OPTIONAL_OUTPUTS


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    outputs: tuple[str, ...],
    gemm: torch.dtype,
    backend: str = "native",
) -> tuple[Tensor | None, ...]:
    """Same contract as `reference.linear_logprobs`, through the compiled op or the Triton op."""
    _ops.refuse_forward_mode("linear_logprobs", hidden, weight, bias)
    keep = backend == "native" and _ops.needs_gradient(hidden, weight, bias)
    vocab, width = weight.shape
    kept = _workspace.logits_to_keep(hidden.shape[0], vocab, width, hidden.device) if keep else 0
    wanted = [name in outputs for name in OPTIONAL_OUTPUTS]
    arguments = (hidden, weight, targets, bias, *transform, ignore_index, gemm, *wanted, kept)
    if backend == "triton":
        from . import triton_ops  # takes triton

        limits = (targets, weight.shape[0], ignore_index)
        refuse = functools.partial(check_target_range, *limits)
        results = triton_ops.linear_logprobs(
            *arguments, *rows_to_visit(targets != ignore_index, wrong_targets(*limits), refuse)
        )
    else:
        results = torch.ops.rlhf_kernels.linear_logprobs(*arguments)
    logprobs, max_logit, log_sum, *optional, _ = results
    entropy, is_top1, mean_logit, log_sum_sq = optional
    optional = (entropy, is_top1.detach(), mean_logit.detach(), log_sum_sq.detach())
    # The logsumexp's gradient travels through log_sum alone: see _backward.
    asked = (value if name in outputs else None for name, value in zip(OPTIONAL_OUTPUTS, optional, strict=True))
    return logprobs, max_logit.detach() + log_sum, *asked


def _fake(hidden, weight, targets, bias, logit_scale, logit_softcap, temperature, ignore_index, gemm_dtype, *flags):  # type: ignore[no-untyped-def]
    *wanted, kept = flags[:5]
    per_row = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3)]
    optional = [hidden.new_empty(hidden.shape[0] if want else 0, dtype=torch.float32) for want in wanted]
    return *per_row, *optional, hidden.new_empty(kept, dtype=torch.float32)


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_logprobs, grad_log_sum, grad_entropy, hidden, weight, targets, bias, max_logit, log_sum, entropy, cache,
    logit_scale, logit_softcap, temperature, ignore_index, gemm_dtype, need_hidden, need_weight, need_bias, *_,
):  # fmt: skip
    def empty_like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return hidden.new_empty(0, dtype=torch.float32)
        return tensor.new_empty(tensor.shape)

    return empty_like(hidden, need_hidden), empty_like(weight, need_weight), empty_like(bias, need_bias)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, *options = inputs[:14]
    _, max_logit, log_sum, entropy, *_, cache = output
    index, ctx.masked = inputs[14:15], inputs[15:]  # the Triton op's
    ctx.save_for_backward(hidden, weight, targets, bias, max_logit, log_sum, entropy, cache, *index)
    ctx.options, ctx.has_entropy = options[:5], options[5]  # scale, softcap, temperature, ignore_index, gemm dtype
    ctx.set_materialize_grads(False)


def _gradient(op, ctx, grad_logprobs, grad_max_logit, grad_log_sum, grad_entropy, *_):  # type: ignore[no-untyped-def]
    """d logsumexp / d z = p: the op's (max, log_sum) pair is one quantity, and log_sum carries its gradient."""
    none = (None,) * len(ctx.needs_input_grad)
    if not ctx.has_entropy:  # an output that was not asked for is empty, and so is the gradient that tracing gives it
        grad_entropy = None
    if grad_logprobs is None and grad_log_sum is None and grad_entropy is None:
        return none
    need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    tensors = ctx.saved_tensors  # read once: inside torch's checkpoint a second reading is an error
    saved, index = tensors[:8], tensors[8:]
    grad_hidden, grad_weight, grad_bias = op(
        grad_logprobs, grad_log_sum, grad_entropy, *saved, *ctx.options, *need, *index, *ctx.masked
    )
    given = (grad_hidden if need[0] else None, grad_weight if need[1] else None, None)
    return (*given, grad_bias if need[2] else None, *none[4:])


register = functools.partial(
    _ops.register, fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, gradient=_gradient
)
if _extension.native_available():
    register("linear_logprobs", "linear_logprobs_backward")
