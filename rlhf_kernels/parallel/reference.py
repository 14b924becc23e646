"""A shard's statistics and gradients in plain torch: chunks of rows inside the workspace budget, sums in fp64.

Not `logprob.reference` and `kl.reference` again: those leave one whole vocabulary to autograd. A shard needs its own
statistics apart, in fp64 for the merge, and gradients from the merged ones, which autograd of a shard cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._logits import Gradients, Needs, Side, logit_dtype, raw_logits, rounded_upcast
from .._workspace import workspace_budget_bytes
from ..kl import autograd as kl_autograd
from ..logprob import autograd as logprob_autograd

_COPIES = 12  # tensors of a chunk's [rows, V_local] in fp64 that live at the same time, at most


def logprob_statistics(side: Side, targets: Tensor, wanted: tuple[str, ...]) -> list[Tensor]:
    """See `backends.logprob_statistics`; the formulas are those of `logprob.reference`."""
    upcast = _upcast(side)
    parts = []
    for rows in _chunks(side):
        z = _logits(upcast, side.hidden[rows]).double()
        y = targets[rows].clamp(min=0)
        m, log_sum = _max_and_log_sum(z)
        shifted = z - _finite(m)[:, None]
        fields = [m, log_sum, shifted.gather(-1, y[:, None]).squeeze(-1)]
        log_p = shifted - log_sum[:, None]
        if "entropy" in wanted:
            fields.append(-(log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p)).sum(-1))
        if "is_top1" in wanted:
            fields.append((z.argmax(-1) == y).double())
        if "mean_logit" in wanted:
            fields.append(z.mean(-1))
        if "log_sum_sq_probs" in wanted:
            fields.append((2 * log_p).logsumexp(-1))
        parts.append(torch.stack(fields))
    return list(_joined(parts, 3 + len(wanted), side.hidden).unbind(0))


def logprob_gradients(
    side: Side,
    targets: Tensor,
    upstream: logprob_autograd.Upstream,
    statistics: logprob_autograd.Statistics,
    needs: Needs,
) -> Gradients:
    """d loss / d z_v = g_lp [v = y] + p_v ((g_lse - g_lp) - g_H (log p_v + H)), with 1 - p_y as -expm1(log p_y)."""

    max_logit, log_sum, entropy, _ = statistics
    into_logprobs, into_log_sum, into_entropy = upstream
    assert into_logprobs is not None and into_log_sum is not None  # zeros where there is no gradient

    def dlogits(z: Tensor, rows: slice) -> Tensor:
        log_p = (z.double() - max_logit[rows, None]) - log_sum[rows, None]
        p = log_p.exp()
        spread = into_log_sum[rows, None].expand_as(p)
        if into_entropy is not None:
            finite = torch.where(p == 0, 0.0, log_p)
            spread = spread - into_entropy[rows, None] * (finite + entropy[rows, None])
        y, of_target = targets[rows].clamp(min=0)[:, None], into_logprobs[rows, None]
        others = p * (spread - of_target)
        at_target = p.gather(-1, y) * spread.gather(-1, y) - of_target * torch.expm1(log_p.gather(-1, y))
        return others.scatter(-1, y, at_target)

    return _pull_back(side, dlogits, needs)


def kl_statistics(policy: Side, ref: Side, policy_ref: bool) -> list[Tensor]:
    """See `backends.kl_statistics`. In fp64 the plain difference of log-probs costs 1e-15 nats, even near the
    reference, and no centre is needed: it is 0."""
    own, other = _upcast(policy), _upcast(ref)
    parts = []
    for rows in _chunks(policy):
        z = _logits(own, policy.hidden[rows]).double()
        y = _logits(other, ref.hidden[rows]).double()
        z, y = (z, y) if policy_ref else (y, z)
        (m, log_sum), (om, other_sum) = _max_and_log_sum(z), _max_and_log_sum(y)
        log_p = (z - m[:, None]) - log_sum[:, None]
        log_q = (y - om[:, None]) - other_sum[:, None]
        kl = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
        shift = (om + other_sum) - (m + log_sum)
        parts.append(torch.stack([kl, m, log_sum, om, other_sum, torch.zeros_like(m), shift]))
    return list(_joined(parts, 7, policy.hidden).unbind(0))


def kl_gradients(
    grad_kl: Tensor,
    statistics: kl_autograd.Statistics,
    policy: Side,
    ref: Side,
    policy_ref: bool,
    needs: Needs,
) -> Gradients:
    """d loss / d z_v, with d_v = log p_v - log q_v: p_v (d_v - KL) for the logits of the p that weighs, q_v - p_v for
    the other's."""
    upcast_ref, (kl, stats, _) = _upcast(ref), statistics

    def dlogits(z: Tensor, rows: slice) -> Tensor:
        z = z.double()
        with torch.no_grad():
            y = _logits(upcast_ref, ref.hidden[rows]).double()
        m, log_sum, om, other_sum, centre, shift = stats[:, rows, None]
        weighing, other = (z, y) if policy_ref else (y, z)
        p = ((weighing - m) - log_sum).exp()
        if policy_ref:
            d = ((z - y) - centre) + shift
            return grad_kl[rows, None] * torch.where(p == 0, 0.0, p * (d - kl[rows, None]))
        return grad_kl[rows, None] * (((other - om) - other_sum).exp() - p)

    return _pull_back(policy, dlogits, needs)


def _max_and_log_sum(z: Tensor) -> tuple[Tensor, Tensor]:
    m = z.amax(-1)
    return m, (z - _finite(m)[:, None]).logsumexp(-1)


def _finite(m: Tensor) -> Tensor:
    """A row of -inf has no finite maximum to subtract."""
    return torch.where(m.isneginf(), 0.0, m)


def _upcast(side: Side) -> Side:
    """The head as the GEMM reads it: once, outside the chunks."""
    head = side.head.detach()
    bias = None if head.bias is None else head.bias.to(logit_dtype(side.gemm))
    return side._replace(head=head._replace(weight=rounded_upcast(head.weight, side.gemm), bias=bias))


def _logits(side: Side, hidden: Tensor) -> Tensor:
    z = raw_logits(hidden, side.head.weight, side.gemm)
    return side.transform.apply(z if side.head.bias is None else z + side.head.bias)


def _chunks(side: Side) -> Iterator[slice]:
    rows = max(1, workspace_budget_bytes(side.hidden.device) // (_COPIES * 8 * side.head.weight.shape[0]))
    return (slice(begin, begin + rows) for begin in range(0, side.hidden.shape[0], rows))


def _joined(parts: list[Tensor], fields: int, hidden: Tensor) -> Tensor:
    return torch.cat(parts, 1) if parts else hidden.new_empty((fields, 0), dtype=torch.float64)


def _pull_back(side: Side, dlogits: Callable[[Tensor, slice], Tensor], needs: Needs) -> Gradients:
    """Gradients of hidden (not rounded), weight and bias, from `dlogits(z, rows)` of each chunk's logits."""
    upcast = _upcast(side)
    weight, bias = upcast.head.weight.requires_grad_(needs.weight), upcast.head.bias
    leaves = [weight] if bias is None else [weight, bias.requires_grad_(needs.bias)]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    grad_hidden = side.hidden.new_zeros(side.hidden.shape, dtype=logit_dtype(side.gemm))
    for rows in _chunks(side):
        with torch.enable_grad():
            hidden = side.hidden[rows].detach().requires_grad_()
            z = _logits(upcast, hidden)
        dz = dlogits(z.detach(), rows).to(z.dtype)
        wanted = [hidden, *(leaf for leaf in leaves if leaf.requires_grad)]
        grad_hidden[rows], *rest = torch.autograd.grad(z, wanted, dz)
        for total, leaf in zip(sums, leaves, strict=True):
            if leaf.requires_grad:
                total += rest.pop(0)
    own = side.head
    return Gradients(
        grad_hidden if needs.hidden else None,
        sums[0].to(own.weight.dtype) if needs.weight else None,
        sums[1].to(own.bias.dtype) if own.bias is not None and needs.bias else None,
    )
