"""Per-token and per-sequence log-probabilities of a linear LM head, without the `[tokens, vocab]` matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_head, check_target_range, check_targets
from .._dispatch import resolve_backend
from .._logits import LogitTransform, gemm_dtype
from .._rows import is_traced_or_captured
from . import ops, reference

__all__ = ["LinearLogprobs", "SequenceLogprobs", "linear_logprobs", "sequence_logprobs"]


class LinearLogprobs(NamedTuple):
    """Per-token results, each of the targets' shape, fp32 (fp64 for fp64 inputs), in nats; None if not asked for."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    mean_logit: Tensor | None
    log_sum_sq_probs: Tensor | None


class SequenceLogprobs(NamedTuple):
    """Per-sequence results: `logprobs` [B] fp32 in nats and `token_counts` [B] int64."""

    logprobs: Tensor
    token_counts: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> LinearLogprobs:
    r"""Log-probability of each target under `softmax(logits)`, with the logits never held all at once.

    logits z = cap * tanh((hidden @ weight.T + bias) * logit_scale / cap) / temperature  (no tanh without a cap)

        logprobs         = z_y - logsumexp(z)
        entropy          = -sum_v p_v log p_v
        is_top1          = 1.0 where y is the (first) argmax of z
        mean_logit       = mean_v z_v
        log_sum_sq_probs = log sum_v p_v^2

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D], any of these dtypes; under autocast both are read in autocast's dtype.
        targets: [...] int64 in [0, V), or `ignore_index`.
        bias: [V] or None.
        temperature, logit_scale, logit_softcap: see the equation; a soft cap of None is none.
        ignore_index: rows with this target give exactly 0 and get exactly zero gradient; no matmul is spent on them.
        outputs: any of "entropy", "is_top1", "mean_logit", "log_sum_sq_probs".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        LinearLogprobs of [...] tensors: fp32 whatever the inputs (fp64 for fp64), in nats. Differentiable in `hidden`,
        `weight` and `bias` through logprobs, logsumexp and entropy; gradients come in each input's own dtype.
        The bits of a row's results do not depend on the other rows, its position, or the number of threads.

    Raises:
        ValueError: shapes or devices that do not fit, unknown output or backend, a backend that cannot run.
        TypeError: a dtype that is not supported.
        IndexError: a target outside [0, V) that is not `ignore_index`. (While a CUDA graph is captured nothing can be
            read back: such a target's log-prob is NaN, and ignored rows are masked instead of skipped.)

    Source: online softmax after Milakov & Gimelshein (2018), arXiv:1805.02867; recompute in backward after
    Wijmans et al. (2024), "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    return _linear_logprobs(
        hidden, weight, targets, bias, LogitTransform.checked(temperature, logit_scale, logit_softcap), ignore_index,
        outputs, backend,
    )  # fmt: skip


def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    outputs: Sequence[str],
    backend: str,
) -> LinearLogprobs:
    check_head(hidden, weight, bias)
    check_targets(targets, hidden)
    for name in outputs:
        check_choice("outputs", name, reference.OPTIONAL_OUTPUTS)
    gemm = gemm_dtype(hidden, weight)
    flat = (hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias)
    options = (transform, ignore_index, tuple(outputs), gemm)
    chosen = resolve_backend(backend, hidden.device, gemm)
    if chosen == "reference":
        if not is_traced_or_captured(hidden):
            check_target_range(targets, weight.shape[0], ignore_index)
        results = reference.linear_logprobs(*flat, *options)
    else:
        results = ops.linear_logprobs(*flat, *options, chosen)
    logprobs, logsumexp, *optional = (None if r is None else r.view(targets.shape) for r in results)
    assert logprobs is not None and logsumexp is not None  # only the others are optional
    return LinearLogprobs(logprobs, logsumexp, *optional)


def next_token_targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """labels [B, T] in the HF convention -> targets [B, T]: position t predicts token t + 1, the last one nothing."""
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = True,
    average: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> SequenceLogprobs:
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t) of each sequence, over its unmasked tokens.

    Args:
        hidden: [B, T, D], the last hidden states of the whole sequence.
        weight, bias, temperature, logit_scale, logit_softcap, ignore_index, backend: as in `linear_logprobs`.
        labels: [B, T] int64, -100 where masked (prompt, padding): the convention of Hugging Face, not yet shifted.
        shift: position t predicts labels[:, t + 1]. False: labels are already the targets of their positions.
        average: divide by the number of unmasked tokens.

    Returns:
        SequenceLogprobs(logprobs [B] in nats (nats per token with `average`), token_counts [B]). A fully masked row
        gives 0, with zero gradient.

    Raises: as `linear_logprobs`.
    """
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, T, D], got {tuple(hidden.shape)}")
    check_targets(labels, hidden, "labels")
    transform = LogitTransform.checked(temperature, logit_scale, logit_softcap)
    return _sequence_logprobs(hidden, weight, labels, bias, transform, shift, average, ignore_index, backend)


def _sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    shift: bool,
    average: bool,
    ignore_index: int,
    backend: str,
) -> SequenceLogprobs:
    targets = next_token_targets(labels, ignore_index) if shift else labels
    per_token = _linear_logprobs(hidden, weight, targets, bias, transform, ignore_index, (), backend)
    counts = (targets != ignore_index).sum(-1)
    totals = per_token.logprobs.sum(-1)
    return SequenceLogprobs(totals / counts.clamp(min=1) if average else totals, counts)
