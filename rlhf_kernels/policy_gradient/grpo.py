"""Group-relative policy optimisation and its relatives: one advantage a sequence, no critic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_same_device, check_vectors
from ..kl import kl_penalty
from .ppo import ClipFraction, clip_fraction
from .tokens import check_tokens, clipped_objective, log_clip_range, only_where


class Variant(NamedTuple):
    ratio: str = "token"  # of what: "token"; "mean" of the log-ratios of a sequence's tokens; their "sum"
    weighs: str = "ratio"  # A times the clipped "ratio", or a "soft" one; or A log pi, by the "clipped" ratio or "one"
    row: str = "mean"  # a sequence's tokens: their "mean", their "sum", or their sum over "max_length"
    mean_over: str = "sequences"  # or "tokens": all of the call alike, then `row` does not matter


SATURATED = 80.0  # log r from which on sapo's gate is 1 in fp32 and fp64, and e^(log r) still finite

VARIANTS = {
    "grpo": Variant(),
    "dr_grpo": Variant(row="max_length"),
    "dapo": Variant(mean_over="tokens"),
    "gspo": Variant(ratio="mean"),
    "cispo": Variant(weighs="clipped", mean_over="tokens"),
    "rloo": Variant(ratio="sum", row="sum"),
    "reinforce": Variant(weighs="one", row="sum"),
    "sapo": Variant(weighs="soft"),
}


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: str = "grpo",
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampler_logprobs: Tensor | None = None,
    is_cap: float | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
) -> Tensor:
    r"""Policy gradient with one advantage a sequence. The variants differ in the ratio and in what the mean is over.

    With A the sequence's advantage, n its number of tokens, log r = logprobs - old_logprobs, sg() what gets no
    gradient, and P(x) = -min(x A, clip(x, 1 - clip_low, 1 + clip_high) A), `ppo_loss`'s:

        grpo       mean over sequences of 1/n sum_t P(r_t)
        dr_grpo    mean over sequences of 1/max_length sum_t P(r_t): no length changes what a token counts
        dapo       mean over all tokens of P(r_t), usually with clip_high > clip_low
        gspo       mean over sequences of P(s), s = exp(1/n sum_t log r_t)
        cispo      mean over all tokens of -sg(clip(r_t)) A log pi_t: clipped tokens, too, keep a gradient
        rloo       mean over sequences of P(s), s = exp(sum_t log r_t), the ratio of the sequences' probabilities
        reinforce  mean over sequences of -sum_t A log pi_t: no ratio, no clipping; old_logprobs matter to the sampler's
                   weights only
        sapo       mean over sequences of 1/n sum_t -A sigmoid(tau (r_t - 1)) 4/tau, tau of the advantage's sign

    The KL is added as beta times the same mean of its tokens: 1/n sum_t for grpo and gspo, 1/max_length sum_t for
    dr_grpo, over all tokens for dapo and cispo, sum_t (the KL of the sequence) for rloo and reinforce.

    On policy (r = 1) the gradients of rloo and reinforce are the paper's, -A grad log pi(sequence). Off it rloo takes
    the exact importance ratio, clipped; clip_low=1 and clip_high=infinity leave it as it is. The leave-one-out baseline
    and the group's mean and deviation are in the advantages, which the caller makes.

    Sampler weights: where the sampler's log-probabilities are not the trainer's (another engine, another precision),
    the policy's term is multiplied by sg(min(exp(old_logprobs - sampler_logprobs), is_cap)): a token's term by the
    token's weight, and a sequence's term (gspo, rloo) by the sequence's, of the same mean or sum as its ratio. The KL
    is not: its weight would vanish just where the policy has left its samples behind, and with it what pulls back.
    `weights`, of `importance_weights` say, multiply it likewise; a sequence's term (gspo, rloo) takes their mean.

    Args:
        logprobs: [B, T] log-probabilities of the sampled tokens in nats; the gradient goes to these.
        old_logprobs: [B, T] of the policy that sampled, as the trainer computes them. No gradient.
        advantages: [B]. No gradient.
        mask: [B, T] bool, True where the token counts. What stands elsewhere, NaN included, is not looked at. A row
            without any gives 0 with zero gradient, and is one of the B sequences.
        variant: see above.
        ref_logprobs: [B, T] of the reference: the KL is `kl_penalty`'s k3. No gradient.
        kl: [B, T] KL per token in nats that the caller has computed, e.g. the exact one of `linear_kl`; its gradient is
            taken. Not with ref_logprobs.
        beta: >= 0, finite; > 0 needs ref_logprobs or kl. At 0 neither is read.
        clip_low, clip_high: clip_low in [0, 1], clip_high >= 0; 1 and infinity do not clip. cispo clips both sides
            whatever A is; its authors leave the lower side free (clip_low=1). gspo's are smaller, some 3e-4. reinforce
            does not read them.
        sampler_logprobs: [B, T] as the sampler itself reports them, or None. No gradient.
        is_cap: > 0, the largest weight; needed with sampler_logprobs, infinity does not truncate.
        max_length: >= 1, the most tokens a sequence may have; dr_grpo needs it and no other reads it.
        weights: [B, T], >= 0, of the policy's term, or None. No gradient.
        dual_clip: as for `ppo_loss`; not with cispo, reinforce and sapo, whose gradients are bounded without.
        sapo_temperatures: > 0 each, tau where A > 0 and where A <= 0.

    Returns:
        A scalar, fp32 (fp64 for fp64 log-probabilities), in the units of the advantages; its value means little for
        cispo and reinforce, its gradient is what counts. 0 if nothing counts. A call of many sequences may be made of
        several: see `grpo_loss_weights`. A negative advantage leaves the ratio unbounded from above: beyond log r = 88
        loss and gradient are infinite (in fp32), and never NaN.

    Raises:
        ValueError: shapes or devices that do not fit, unknown variant, constants missing or out of range.
        TypeError: unsupported dtype, `mask` not bool.

    Source: grpo: Shao et al. (2024), "DeepSeekMath", arXiv:2402.03300, eq. 3 and 4; dr_grpo: Liu et al. (2025),
    "Understanding R1-Zero-Like Training", arXiv:2503.20783; dapo: Yu et al. (2025), arXiv:2503.14476, eq. 8; gspo:
    Zheng et al. (2025), arXiv:2507.18071, eq. 5 and 7; cispo: MiniMax (2025), "MiniMax-M1", arXiv:2506.13585, eq. 4
    and 5; rloo: Ahmadian et al. (2024), "Back to Basics", arXiv:2402.14740; reinforce: Williams (1992); the sampler's
    weights: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; sapo: Gao et
    al. (2025), "Soft Adaptive Policy Optimization", arXiv:2511.20347.
    """
    check_choice("variant", variant, VARIANTS)
    kind = VARIANTS[variant]
    dtype = check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    others = {"ref_logprobs": ref_logprobs, "kl": kl, "sampler_logprobs": sampler_logprobs, "weights": weights}
    check_tokens(mask, logprobs=logprobs, **others)
    check_vectors(mask.shape[0], advantages=advantages)
    check_same_device(logprobs=logprobs, advantages=advantages)
    log_low, log_high = log_clip_range(clip_low, clip_high)
    _check_options(variant, ref_logprobs, kl, beta, sampler_logprobs, is_cap, max_length)
    if dual_clip is not None and not (dual_clip > 1 and kind.weighs == "ratio"):
        raise ValueError(f"dual_clip must be > 1, and not with variant={variant!r}; got {dual_clip}")
    if not min(sapo_temperatures) > 0:
        raise ValueError(f"sapo_temperatures must be > 0, got {sapo_temperatures}")

    logprobs, old = only_where(mask, logprobs, dtype), only_where(mask, old_logprobs.detach(), dtype)
    lengths = mask.sum(-1).clamp(min=1)  # [B]
    advantages, counted, log_ratios = advantages.detach().to(dtype)[:, None], mask, logprobs - old
    log_weights = torch.zeros_like(old)
    if sampler_logprobs is not None:
        log_weights = old - only_where(mask, sampler_logprobs.detach(), dtype)
    if kind.ratio != "token":  # [B, 1]: one of each a sequence
        counted = mask.any(-1, keepdim=True)
        log_ratios, log_weights = (_of_sequences(logs, mask, kind) for logs in (log_ratios, log_weights))
    log_weights = log_weights.clamp(max=math.inf if is_cap is None else math.log(is_cap))
    advantages = advantages.expand_as(counted)
    if weights is not None:
        weights = only_where(mask, weights.detach(), dtype)
        if kind.ratio != "token":
            weights = weights.sum(-1, keepdim=True) / lengths[:, None]
        counted = counted & (weights != 0)  # 0 leaves nothing of any ratio
        log_weights = log_weights + torch.where(counted, weights, 1.0).log()

    if kind.weighs == "ratio":
        log_most = math.inf if dual_clip is None else math.log(dual_clip)
        terms = clipped_objective(
            log_ratios, advantages, counted, log_low, log_high, log_most=log_most, log_weights=log_weights
        )
    elif kind.weighs == "soft":
        counted = counted & (advantages != 0)
        ratios = only_where(counted, log_ratios, dtype).clamp(max=SATURATED).exp()
        positive, negative = sapo_temperatures
        temperatures = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
        gates = torch.sigmoid(temperatures * (ratios - 1)) * 4 / temperatures
        terms = -only_where(counted, advantages * log_weights.exp(), dtype) * gates
    else:
        if kind.weighs == "clipped":
            log_weights = log_weights + log_ratios.detach().clamp(log_low, log_high)
        counted = counted & (advantages != 0)  # A = 0 leaves nothing of any weight, an infinite one neither
        advantages, log_weights, chosen = (only_where(counted, x, dtype) for x in (advantages, log_weights, logprobs))
        terms = -advantages * log_weights.exp() * chosen

    sequences = max(mask.shape[0], 1)
    loss = terms.sum() / sequences if kind.ratio != "token" else _average(terms, lengths, mask, kind, max_length)
    if beta > 0:
        if ref_logprobs is not None:
            kl = kl_penalty(logprobs, only_where(mask, ref_logprobs.detach(), dtype), "k3")
        if kl is not None:
            loss = loss + beta * _average(only_where(mask, kl, dtype), lengths, mask, kind, max_length)
    return loss


def grpo_loss_weights(mask: Tensor, variant: str) -> Tensor:
    r"""The weight of each sequence in the mean of `grpo_loss`, so that a batch can be computed in parts.

        weights = grpo_loss_weights(mask, variant)
        loss(batch) = sum over parts of loss(part) weights[part].sum() / weights.sum()

    with the same gradient. Divide by the weights of all ranks together, and by no less than 1.

    Args:
        mask: [B, T] bool.
        variant: as for `grpo_loss`. dapo and cispo count tokens, all others sequences, those without tokens as well.

    Returns:
        [B] fp32: the number of tokens of each sequence, or 1.

    Raises:
        ValueError: `mask` not [B, T], unknown variant. TypeError: `mask` not bool.
    """
    check_choice("variant", variant, VARIANTS)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, T], got {tuple(mask.shape)}")
    if VARIANTS[variant].mean_over == "tokens":
        return mask.sum(-1, dtype=torch.float32)
    return torch.ones(mask.shape[0], dtype=torch.float32, device=mask.device)


def grpo_clip_fraction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    variant: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> ClipFraction:
    r"""How much of what `grpo_loss` clips is clipped: `clip_fraction` of the variant's own ratios.

    They are of tokens, for gspo and rloo of sequences. cispo clips whatever the advantage's sign; reinforce and sapo
    nothing.

    Args:
        logprobs, old_logprobs: [B, T] in nats. advantages: [B]. mask: [B, T] bool. variant, clip_low, clip_high: as for
            the loss.

    Returns:
        ClipFraction(low, high), scalars, without gradient.

    Raises:
        ValueError: shapes or devices that do not fit, unknown variant, constants out of range.
        TypeError: unsupported dtype, `mask` not bool.
    """
    check_choice("variant", variant, VARIANTS)
    kind = VARIANTS[variant]
    dtype = check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    check_vectors(mask.shape[0], advantages=advantages)
    check_same_device(logprobs=logprobs, advantages=advantages)
    log_ratios = only_where(mask, logprobs.detach().to(dtype) - old_logprobs.detach().to(dtype), dtype)
    if kind.ratio != "token":
        log_ratios, mask = _of_sequences(log_ratios, mask, kind), mask.any(-1, keepdim=True)
    if kind.weighs in ("one", "soft"):
        mask = torch.zeros_like(mask)
    against = torch.zeros_like(log_ratios)
    if kind.weighs == "clipped":
        lows, highs = (
            clip_fraction(log_ratios, against, sign * torch.ones_like(against), mask, clip_low, clip_high)
            for sign in (-1, 1)
        )
        return ClipFraction(lows.low, highs.high)
    return clip_fraction(log_ratios, against, advantages, mask, clip_low, clip_high)


def _of_sequences(logs: Tensor, mask: Tensor, kind: Variant) -> Tensor:
    """[B, T], 0 where masked -> [B, 1]: mean or sum over the tokens that count."""
    total = logs.sum(-1, keepdim=True)
    return total / mask.sum(-1, keepdim=True).clamp(min=1) if kind.ratio == "mean" else total


def _average(terms: Tensor, lengths: Tensor, mask: Tensor, kind: Variant, max_length: int | None) -> Tensor:
    """terms [B, T], 0 where masked, lengths [B] >= 1 -> scalar."""
    if kind.mean_over == "tokens":
        return terms.sum() / mask.sum().clamp(min=1)
    rows = terms.sum(-1)
    if kind.row == "mean":
        rows = rows / lengths
    elif kind.row == "max_length" and max_length is not None:
        rows = rows / max_length
    return rows.sum() / max(mask.shape[0], 1)


def _check_options(
    variant: str,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    beta: float,
    sampler_logprobs: Tensor | None,
    is_cap: float | None,
    max_length: int | None,
) -> None:
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0, got {beta}")
    if ref_logprobs is not None and kl is not None:
        raise ValueError("give ref_logprobs, for k3, or kl, but not both")
    if beta > 0 and ref_logprobs is None and kl is None:
        raise ValueError(f"beta={beta} needs ref_logprobs [B, T], for k3, or kl [B, T]")
    if (sampler_logprobs is None) != (is_cap is None):
        raise ValueError("sampler_logprobs and is_cap go together; is_cap=math.inf does not truncate")
    if is_cap is not None and not is_cap > 0:
        raise ValueError(f"is_cap must be > 0, got {is_cap}")
    if VARIANTS[variant].row == "max_length" and max_length is None:
        raise ValueError(f"variant={variant!r} divides by the longest that a sequence may be: pass max_length")
    if max_length is not None and not max_length >= 1:
        raise ValueError(f"max_length must be >= 1, got {max_length}")
