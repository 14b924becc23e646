"""`torch.ops.rlhf_kernels.triton_linear_logprobs`: the op of csrc/bindings.cpp in Triton, and which rows to visit."""

from __future__ import annotations

import torch
from torch import Tensor

from .._logits import LogitTransform
from .._triton.launch import define_op
from . import ops, triton_kernels


def _plain_targets(targets: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """-1 where a row does not count, `vocab` or more where a target is no token: its log-prob is NaN."""
    tokens = torch.where(targets < 0, vocab, targets)
    return torch.where(targets == ignore_index, -1, tokens).contiguous()


@define_op("triton_linear_logprobs")
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float,
    temperature: float, ignore_index: int, gemm_dtype: torch.dtype, entropy: bool, is_top1: bool, mean_logit: bool,
    log_sum_sq_probs: bool, kept_logits: int, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`kept_logits` is for the native op; here backward always recomputes."""
    extras = is_top1 or mean_logit or log_sum_sq_probs
    results = triton_kernels.forward(
        hidden, weight, bias, _plain_targets(targets, ignore_index, weight.shape[0]), index,
        LogitTransform(logit_scale, logit_softcap, temperature), gemm_dtype, entropy, extras,
    )  # fmt: skip
    wanted = (True, True, True, entropy, is_top1, mean_logit, log_sum_sq_probs)
    kept = [r if want else r.new_empty(0) for r, want in zip(results, wanted, strict=True)]
    return (*kept, hidden.new_empty(0, dtype=torch.float32))  # type: ignore[return-value]


@define_op("triton_linear_logprobs_backward")
def linear_logprobs_backward(
    grad_logprobs: Tensor | None, grad_log_sum: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor,
    weight: Tensor, targets: Tensor, bias: Tensor | None, max_logit: Tensor, log_sum: Tensor, entropy: Tensor,
    logit_cache: Tensor, logit_scale: float, logit_softcap: float, temperature: float, ignore_index: int,
    gemm_dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool, index: Tensor | None, masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return triton_kernels.backward(
        grad_logprobs, grad_log_sum, grad_entropy, hidden, weight, bias,
        _plain_targets(targets, ignore_index, weight.shape[0]), index, masked, max_logit, log_sum, entropy,
        LogitTransform(logit_scale, logit_softcap, temperature), gemm_dtype, (need_hidden, need_weight, need_bias),
    )  # fmt: skip


ops.register("triton_linear_logprobs", "triton_linear_logprobs_backward")
