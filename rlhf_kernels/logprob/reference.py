"""Log-probabilities under a linear head, in plain torch: the truth the kernels are judged by, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_target_range
from .._logits import Side, logit_dtype, raw_logits, rounded_upcast
from .._rows import is_traced_or_captured, map_counted_rows

# The optional outputs, in the order in which they are returned after (logprobs, logsumexp).
OPTIONAL_OUTPUTS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")


def linear_logprobs(
    side: Side, targets: Tensor, ignore_index: int, outputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """targets [N] -> (logprobs, logsumexp, *optional outputs), each [N], None where not wanted.

    With logits z [V] of a row, m = max z, and p = softmax(z):

        logsumexp        = m + log sum_v e^(z_v - m)
        logprobs         = z_y - logsumexp                       as (z_y - m) - log sum: the shift loses no bits
        entropy          = -sum_v p_v log p_v = log sum - sum_v p_v (z_v - m)
        is_top1          = 1 if y is the first maximum of z else 0
        mean_logit       = (1 / V) sum_v z_v
        log_sum_sq_probs = log sum_v p_v^2
    """
    (hidden, weight, bias), transform, gemm = side.tensors(), side.transform, side.gemm
    dtype, vocab = logit_dtype(gemm), weight.shape[0]
    if not is_traced_or_captured(hidden):
        check_target_range(targets, vocab, ignore_index)
    # Upcast once and outside the chunks: autograd then sums the chunks' gradients in fp32 and rounds once.
    weight, bias = rounded_upcast(weight, gemm), None if bias is None else bias.to(dtype)

    def per_row(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        logits = raw_logits(hidden, weight, gemm)
        z = transform.apply(logits if bias is None else logits + bias)
        m = z.detach().amax(-1)
        shifted = z - torch.where(m.isneginf(), 0.0, m)[:, None]  # a row of -inf has no finite maximum to subtract
        exps = shifted.exp()
        total = exps.sum(-1)
        log_total = total.log()
        results = [shifted.gather(-1, targets[:, None]).squeeze(-1) - log_total, m + log_total]
        if "entropy" in outputs:
            finite = torch.where(shifted.isneginf(), 0.0, shifted)  # 0 * -inf has the limit 0 here
            results.append(log_total - (exps * finite).sum(-1) / total)
        if "is_top1" in outputs:
            results.append((z.argmax(-1) == targets).to(dtype))
        if "mean_logit" in outputs:
            results.append(z.detach().mean(-1))
        if "log_sum_sq_probs" in outputs:
            results.append((2 * shifted.detach()).exp().sum(-1).log() - 2 * log_total.detach())
        return tuple(results)

    counted = targets != ignore_index
    safe_targets = torch.where(counted, targets, 0)
    results = iter(map_counted_rows(per_row, counted, (hidden, safe_targets), (weight, bias), vocab, dtype))
    logprobs, logsumexp = next(results), next(results)
    return logprobs, logsumexp, *(next(results) if name in outputs else None for name in OPTIONAL_OUTPUTS)
