"""Per-token and per-sequence log-probabilities of a linear LM head, without the `[tokens, vocab]` matrix."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_head, check_targets
from .._dispatch import resolve_backend
from .._logits import LMHead, Side
from .._packing import Packing, counts_of_sequences, packing_of, sums_of_sequences
from . import ops, reference

__all__ = ["LinearLogprobs", "SequenceLogprobs", "linear_logprobs", "sequence_logprobs"]


class LinearLogprobs(NamedTuple):
    """Per-token results, each of the targets' shape, fp32 (fp64 for fp64 inputs), in nats; None if not in `outputs`."""

    logprobs: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    mean_logit: Tensor | None
    log_sum_sq_probs: Tensor | None


class SequenceLogprobs(NamedTuple):
    """Per-sequence results, B of them or, of packed sequences, S: `logprobs` fp32 in nats, `token_counts` int64."""

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
        NotImplementedError: forward-mode differentiation (torch.func.jvp).

    Source: online softmax after Milakov & Gimelshein (2018), arXiv:1805.02867; recompute in backward after
    Wijmans et al. (2024), "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    return logprobs_under(head, hidden, targets, temperature, ignore_index, outputs, backend)


def logprobs_under(
    head: LMHead,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    outputs: Sequence[str],
    backend: str,
) -> LinearLogprobs:
    """`linear_logprobs` of a head as a value."""
    head.check_options(temperature)
    check_head(hidden, head.weight, head.bias)
    check_targets(targets, hidden)
    for name in outputs:
        check_choice("outputs", name, reference.OPTIONAL_OUTPUTS)
    side = Side.of(hidden, head, temperature)
    chosen = resolve_backend(backend, hidden.device, side.gemm)
    implementation = reference if chosen == "reference" else ops_of(chosen)
    results = implementation.linear_logprobs(side, targets.reshape(-1), ignore_index, tuple(outputs))
    logprobs, logsumexp, *optional = (None if r is None else r.view(targets.shape) for r in results)
    assert logprobs is not None and logsumexp is not None  # only the others are optional
    return LinearLogprobs(logprobs, logsumexp, *optional)


def ops_of(backend: str) -> ModuleType:
    """The module that serves "native" or "triton"."""
    if backend == "triton":
        from . import triton_ops  # takes triton

        return triton_ops
    return ops


def next_token_targets(labels: Tensor, ignore_index: int = -100, packing: Packing | None = None) -> Tensor:
    """labels in the HF convention -> targets of their shape: position t predicts token t + 1, the last one nothing.

    Each row of [B, T] is a sequence. With packing the sequences lie one after another, through all rows, and the first
    label of each is nobody's target.
    """
    if packing is None:
        return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    following = torch.nn.functional.pad(labels.flatten(), (0, 1), value=ignore_index)
    return following.index_fill(0, packing.boundaries, ignore_index)[1:].view(labels.shape)


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
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLogprobs:
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t) of each sequence, over its unmasked tokens.

    Args:
        hidden: [B, T, D], the last hidden states of the whole sequence.
        weight, bias, temperature, logit_scale, logit_softcap, ignore_index, backend: as in `linear_logprobs`.
        labels: [B, T] int64, -100 where masked (prompt, padding): the convention of Hugging Face, not yet shifted.
        shift: position t predicts labels[:, t + 1]. False: labels are already the targets of their positions.
        average: divide by the number of unmasked tokens.
        cu_seqlens: [S + 1] int32 or int64. Packed: hidden [1, N, D] or [N, D] and labels [1, N] or [N] hold S sequences
            one after another, sequence s being tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1 (flash attention's
            cu_seqlens, transformers' cu_seq_lens_q). Starts at 0, ends at N, never decreases.
        position_ids: or else labels' shape, int32 or int64: 0 at the first token of a sequence, and on by 1 from there.
            hidden may have rows, [B, T, D]: each begins a sequence, and they are numbered row by row. Padding too must
            have such positions; a stretch of it counts as one sequence more.

    Returns:
        SequenceLogprobs(logprobs [B] in nats (nats per token with `average`), token_counts [B]); [S] if packed. A fully
        masked row or sequence, an empty one too, gives 0, with zero gradient.

    Packed sequences give what they give as padded rows: the shift never crosses from one into the next, and the last
    token of each predicts nothing. The native and Triton backends give each token the same bits in both forms (torch's
    matmuls, the reference's, may not). Both forms add in fp64 and round once, so that the sums, too, have the same bits
    but where rounding is undecided to 16 digits. Packed sums are differentiable once, whatever the backend. On a GPU
    cu_seqlens is not read back, position_ids once.

    Raises: as `linear_logprobs`, and
        ValueError: cu_seqlens or position_ids that are not as above, or both. On a GPU, and while a graph is traced or
            captured, cu_seqlens is not read: a wrong one makes every logprob NaN. Such a graph refuses position_ids.
        TypeError: cu_seqlens or position_ids that are not int32 or int64.
    """
    packing = packing_of(hidden, labels, cu_seqlens, position_ids, "[B, T, D]")
    head = LMHead(weight, bias, logit_scale, logit_softcap)
    targets = next_token_targets(labels, ignore_index, packing) if shift else labels
    per_token = logprobs_under(head, hidden, targets, temperature, ignore_index, (), backend).logprobs
    return totals_of(per_token, targets, average, ignore_index, packing)


def totals_of(
    per_token: Tensor, targets: Tensor, average: bool, ignore_index: int, packing: Packing | None
) -> SequenceLogprobs:
    """Log-probs of targets, both [B, T] (or as packed), 0 where ignored -> their sums or means by sequence."""
    counts = counts_of_sequences(targets != ignore_index, packing)
    totals = sums_of_sequences(per_token, packing).to(per_token.dtype)
    return SequenceLogprobs(totals / counts.clamp(min=1) if average else totals, counts)
