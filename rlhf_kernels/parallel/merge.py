"""The merge of all shards' statistics into those of the whole vocabulary: a row's numbers are few, so in fp64.

Every rank merges the same gathered numbers [ranks, n] in the order of the ranks, element by element: the same bits on
every rank, whatever rows came along.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .shards import Shards


class Masses(NamedTuple):
    """max_logit, log_sum [n] of the whole vocabulary; log_share [ranks, n]: log of each shard's probability."""

    max_logit: Tensor
    log_sum: Tensor
    log_share: Tensor


def merge_masses(max_logits: Tensor, log_sums: Tensor) -> Masses:
    """max and log-sum stay apart: log share_r = (m_r - m) + log_sum_r - log sum_r e^(m_r - m + log_sum_r)."""
    m = max_logits.amax(0)
    log_mass = (max_logits - torch.where(m.isneginf(), 0.0, m)) + log_sums
    log_sum = log_mass.exp().sum(0).log()
    return Masses(m, log_sum, log_mass - log_sum)


def merge_logprobs(gathered: Tensor, owners: Tensor, shards: Shards, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """gathered [ranks, 3 + len(wanted), n] of `backends.logprob_statistics`, owners [n]: the ranks that hold targets.

    Returns logprobs, max_logit, log_sum and those wanted, each [n], and the shares [ranks, n], fp64. With the share a_r
    of shard r:

        logprobs         = (z_y - m_r) + (m_r - m) - log_sum             r holds y
        entropy          = sum_r a_r (H_r - log a_r)                     no term is negative
        is_top1          = y is its shard's first maximum, and no shard has a larger one, or an earlier one as large
        mean_logit       = sum_r V_r mean_r / sum_r V_r
        log_sum_sq_probs = log sum_r a_r^2 sum_(v in r) p_v^2
    """
    max_logits, log_sums, targets, *optional = gathered.double().unbind(1)
    masses = merge_masses(max_logits, log_sums)
    named = dict(zip(wanted, optional, strict=True))
    share = masses.log_share.exp()
    of_max = max_logits.gather(0, owners[None]).squeeze(0)
    own_target = targets.gather(0, owners[None]).squeeze(0)
    merged = {
        "logprobs": own_target + (of_max - masses.max_logit.clamp(min=_LOWEST)) - masses.log_sum,
        "max_logit": masses.max_logit,
        "log_sum": masses.log_sum,
        "shares": share,
    }
    if "entropy" in named:
        terms = share * (named["entropy"] - masses.log_share)
        merged["entropy"] = torch.where(share == 0, 0.0, terms).sum(0)
    if "is_top1" in named:
        ranks = torch.arange(len(shards.sizes), device=owners.device)[:, None]
        earlier = (ranks < owners) & (_sizes(shards, owners) > 0) & (max_logits == of_max)
        beaten = (earlier | (max_logits > of_max)).any(0)
        merged["is_top1"] = torch.where(beaten, 0.0, named["is_top1"].gather(0, owners[None]).squeeze(0))
    if "mean_logit" in named:
        sizes = _sizes(shards, owners)
        merged["mean_logit"] = (named["mean_logit"] * sizes).sum(0) / shards.vocab_size
    if "log_sum_sq_probs" in named:
        squares = torch.where(share == 0, -torch.inf, named["log_sum_sq_probs"] + 2 * masses.log_share)
        merged["log_sum_sq_probs"] = squares.logsumexp(0)
    return merged


_LOWEST = torch.finfo(torch.float64).min  # a maximum of -inf is not to be subtracted from another


def _sizes(shards: Shards, like: Tensor) -> Tensor:
    return torch.tensor(shards.sizes, dtype=torch.float64, device=like.device)[:, None]


def merge_kl(gathered: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """gathered [ranks, 7, n] of `backends.kl_statistics` -> KL [n], and stats [6, n] for `rank`'s backward, both fp64.

    With shard r's shares a_r of p and b_r of q, and the shards' own divergences KL_r,

        KL(p || q) = sum_r a_r KL_r + KL(a || b),

    where nothing is negative: a small KL does not cancel. KL(a || b) is sum_r a_r d_r of d_r = log a_r - log b_r, which
    is l_r - l with l = logsumexp(z) - logsumexp(y) of the whole vocabulary, and l_r of the shard, which its centre and
    shift give without cancellation. The plain difference of the merged logsumexps has the rounding of its fp32 terms;
    sum_r b_r = 1 corrects it, since b_r = a_r e^(l - l_r) where p is. Of second order then remains what fp64 can tell.
    """
    kl, max_p, log_sum_p, max_q, log_sum_q, centre, shift = gathered.double().unbind(1)
    p, q = merge_masses(max_p, log_sum_p), merge_masses(max_q, log_sum_q)
    a, b = p.log_share.exp(), q.log_share.exp()
    held = a > 0
    impossible = (held & max_q.isneginf()).any(0)
    ratio = torch.where(held & ~max_q.isneginf(), centre - shift, 0.0)

    plain = (p.max_logit - q.max_logit) + (p.log_sum - q.log_sum)
    by_plain = torch.where(held, a * torch.expm1(plain - ratio), 0.0).sum(0)  # what b sums to where p is, less 1
    elsewhere = torch.where(held, 0.0, b).sum(0)
    correction = torch.log1p(by_plain) - torch.log1p(-elsewhere)
    rounding = 1e-6 * (4 + p.max_logit.abs() + q.max_logit.abs())
    whole = torch.where(correction.abs() <= rounding, plain - correction, plain)  # b / a overflows, or b is elsewhere

    d = torch.where(held, ratio - whole, 0.0)
    total = torch.where(held, a * (d + kl), 0.0).sum(0)
    total = torch.where(impossible, torch.inf, total.clamp(min=0))
    stats = (p.max_logit, p.log_sum, q.max_logit, q.log_sum, centre[rank], centre[rank] - whole)
    return total, torch.stack(stats)
