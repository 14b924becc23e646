"""`linear_kl` and `kl_penalty` as custom ops: shapes for tracing, and linear_kl's autograd. The kernels, and
kl_penalty's autograd, are in csrc/kl.

The Triton ops of triton_ops.py have the same arguments; linear_kl's has two more, those of `_rows.rows_to_visit`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _extension, _ops, _workspace
from .._logits import LogitTransform
from .._rows import rows_to_visit

ESTIMATORS = ("k1", "k2", "k3")
DIRECTIONS = ("policy_ref", "ref_policy")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str = "native") -> Tensor:
    arguments = (logprobs, ref_logprobs, ESTIMATORS.index(estimator))
    if backend == "triton":
        from . import triton_ops  # takes triton

        _ops.refuse_forward_mode("kl_penalty", logprobs, ref_logprobs)
        return triton_ops.kl_penalty(*arguments)
    return native_penalty(*arguments)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gemm: torch.dtype,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_transform: LogitTransform,
    ref_gemm: torch.dtype,
    mask: Tensor,
    direction: str,
    backend: str = "native",
) -> Tensor:
    """Same contract as `reference.linear_kl`, through the compiled op or the Triton op."""
    _ops.refuse_forward_mode("linear_kl", hidden, weight, bias)
    kept = 0
    if backend == "native" and _ops.needs_gradient(hidden, weight, bias):
        rows, (vocab, width) = hidden.shape[0], weight.shape
        kept = _workspace.logits_to_keep(rows, vocab, width, hidden.device, ref_weight.shape[1])
    arguments = (
        hidden, weight, bias, *transform, gemm,
        ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach(), *ref_transform,
        ref_gemm, mask, direction == "policy_ref", kept,
    )  # fmt: skip
    if backend == "triton":
        from . import triton_ops  # takes triton

        return triton_ops.linear_kl(*arguments, *rows_to_visit(mask))[0]
    return torch.ops.rlhf_kernels.linear_kl(*arguments)[0]


def _fake_kl(hidden, *others):  # type: ignore[no-untyped-def]
    rows, kept = hidden.shape[0], others[15]
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (6, rows), (kept,)))


def _fake_kl_backward(grad_kl, kl, stats, cache, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    need_hidden, need_weight, need_bias = rest[13:16]

    def empty_like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return hidden.new_empty(0, dtype=torch.float32)
        return tensor.new_empty(tensor.shape)

    return empty_like(hidden, need_hidden), empty_like(weight, need_weight), empty_like(bias, need_bias)


def _setup_kl(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, *options, ref_hidden, ref_weight, ref_bias = inputs[:10]
    index, ctx.masked = inputs[17:18], inputs[18:]  # the Triton op's
    ctx.save_for_backward(*output, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, inputs[14], *index)
    ctx.options, ctx.ref_options, ctx.policy_ref = options, inputs[10:14], inputs[15]
    ctx.set_materialize_grads(False)


def _gradient_kl(op, ctx, grad_kl, *_):  # type: ignore[no-untyped-def]
    none = (None,) * len(ctx.needs_input_grad)
    if grad_kl is None:
        return none
    kl, stats, cache, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, *index = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    grads = op(
        grad_kl, kl, stats, cache, hidden, weight, bias, *ctx.options,
        ref_hidden, ref_weight, ref_bias, *ctx.ref_options, mask, ctx.policy_ref, *need, *index, *ctx.masked,
    )  # fmt: skip
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)) + none[3:]


def fake_penalty(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=torch.float32).contiguous()


register_linear_kl = functools.partial(
    _ops.register, fake=_fake_kl, fake_backward=_fake_kl_backward, setup_context=_setup_kl, gradient=_gradient_kl
)
if _extension.native_available():
    register_linear_kl("linear_kl", "linear_kl_backward")
    native_penalty = torch.ops.rlhf_kernels.kl_penalty.default
    _ops.register_shapes("kl_penalty", "kl_penalty_backward", fake_penalty, fake_penalty)
