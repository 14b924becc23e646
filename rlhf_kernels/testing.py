"""The measure of every backend: seeded inputs, the fp64 truth, eager torch in fp32, and tolerances with reasons.

Tests and benchmarks share this page, so that a speed is never reported for results that a test would refuse. The
`plain_*` functions are independent statements of the maths with the full logits in memory: in float64 they are the
truth, in float32 on upcast inputs they are "eager", the error that the kernels are allowed to double. Checks raise
AssertionError and say by how much a limit is exceeded. Nothing here needs a test framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logprob import LinearLogprobs

OUTPUTS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
DIFFERENTIABLE = ("logprobs", "logsumexp", "entropy")

# Kinds of logits: (standard deviation, mean) of z over the vocabulary.
LOGITS = {
    "normal": (2.0, 0.0),  # a language model in the middle of its training
    "flat": (0.01, 0.0),  # a fresh model: p near 1/V, entropy near log V
    "peaked": (12.0, 0.0),  # one token takes nearly everything, so p_y - 1 cancels unless it comes from expm1
    "large": (4000.0, 0.0),  # |z| around 1e4: e^z overflows unless the maximum is taken off first
    "negative": (2.0, -200.0),  # every z below -88: a running maximum that starts at 0 underflows every term
    "positive": (2.0, 200.0),  # logsumexp >= 64: one rounded fp32 logsumexp would lose more than eager does
}


# --- inputs ---


class Head(NamedTuple):
    """hidden [N, D], weight [V, D], targets [N] int64, bias [V] or None: `linear_logprobs`' arguments in order."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None


class KLInputs(NamedTuple):
    """The tensors of `linear_kl` by name; `ref_hidden` may be wider or narrower than `hidden`."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    mask: Tensor | None
    bias: Tensor | None
    ref_bias: Tensor | None


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The same normal numbers whatever the device, rounded to `dtype` at the end."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make_head(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool | torch.dtype = False,
    logits: str = "normal",
    masked: float = 0.0,
    ignore_index: int = -100,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Head:
    """A seeded LM head whose logits are of the given kind (see `LOGITS`).

    `weight_dtype` defaults to `dtype`; `bias` may name its own dtype. A fraction `masked` of the targets, rounded, is
    `ignore_index`; the others never are, even where `ignore_index` is a valid token.
    """
    deviation, mean = LOGITS[logits]
    hidden = randn(n, d, seed=seed, dtype=torch.float64)
    weight = randn(v, d, seed=seed + 1, dtype=torch.float64) * (deviation / math.sqrt(d))
    if mean:  # one coordinate carries the mean: 8 is exact in every dtype
        hidden[:, 0] = 8.0
        weight[:, 0] = mean / 8.0 + weight[:, 0] / 8.0
    generator = torch.Generator().manual_seed(seed + 2)
    targets = torch.randint(v, (n,), generator=generator)
    if v > 1:
        targets = torch.where(targets == ignore_index, (targets + 1) % v, targets)
    targets[torch.randperm(n, generator=generator)[: round(masked * n)]] = ignore_index
    bias_dtype = dtype if bias is True else bias
    return Head(
        hidden.to(device, dtype),
        weight.to(device, dtype if weight_dtype is None else weight_dtype),
        targets.to(device),
        None if bias_dtype is False else randn(v, seed=seed + 3, dtype=bias_dtype, device=device),
    )


def make_kl_inputs(
    n: int,
    d: int,
    v: int,
    *,
    ref_d: int | None = None,
    kl: float | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    logits: str = "normal",
    masked: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> KLInputs:
    """Two seeded models. `kl` None makes them independent (several nats apart); a number moves the policy off the
    reference until the mean KL over rows is about that, 0 makes them identical.

    The policy is moved through its hidden states in float32 and float64. bfloat16 and float16 cannot take so small a
    step there, so a float32 bias moves it.
    """
    ref = make_head(n, ref_d or d, v, dtype=dtype, bias=bias, logits=logits, seed=seed, device=device)
    if kl is None:
        policy = make_head(n, d, v, dtype=dtype, bias=bias, logits=logits, seed=seed + 100, device=device)
    elif kl == 0:
        policy = ref
    else:
        by_bias = dtype in (torch.bfloat16, torch.float16)
        step = randn(*((v,) if by_bias else (n, d)), seed=seed + 200, dtype=torch.float64, device=device)

        def moved(size: float) -> Head:
            if not by_bias:
                return ref._replace(hidden=(ref.hidden.double() + size * step).to(dtype))
            start = torch.zeros_like(step) if ref.bias is None else ref.bias.double()
            return ref._replace(bias=(start + size * step).float())

        far = moved(0.1)  # KL is quadratic near the reference
        kl_far = plain_linear_kl(far.hidden, ref.weight, ref.hidden, ref.weight, bias=far.bias, ref_bias=ref.bias)
        policy = moved(0.1 * math.sqrt(kl / kl_far.mean().item()))
    mask = None
    if masked:
        mask = torch.ones(n, dtype=torch.bool, device=device)
        mask[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: round(masked * n)].to(device)] = False
    return KLInputs(policy.hidden, policy.weight, ref.hidden, ref.weight, mask, policy.bias, ref.bias)


# --- the plain statements: float64 is the truth, float32 is eager ---


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The whole [..., V] matrix, computed in `dtype` from the inputs as they are."""
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = (z if bias is None else z + bias.to(dtype)) * logit_scale
    return (z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)) / temperature


def plain_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
    **logit_options: Any,
) -> LinearLogprobs:
    """Every output of `linear_logprobs` by `log_softmax` of the full logits."""
    counted = targets != ignore_index
    hidden = torch.where(counted[..., None], hidden, torch.zeros_like(hidden))
    z = plain_logits(hidden, weight, bias, dtype=dtype, **logit_options)
    logp = z.log_softmax(-1)
    y = targets.where(counted, torch.zeros_like(targets))[..., None]
    finite = logp.masked_fill(logp.isneginf(), 0.0)  # p log p has the limit 0
    results = (
        logp.gather(-1, y)[..., 0],
        z.logsumexp(-1),
        -(logp.exp() * finite).sum(-1),
        (z.argmax(-1, keepdim=True) == y)[..., 0].to(dtype),
        z.mean(-1),
        (2 * logp).logsumexp(-1),
    )
    return LinearLogprobs(*(r.where(counted, torch.zeros_like(r)) for r in results))


def plain_sequence_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **logit_options: Any
) -> Tensor:
    """[B, T, D], [V, D], labels [B, T] -> [B]: sum of log-probs, position t predicting labels[:, t + 1]."""
    return plain_linear_logprobs(hidden[:, :-1], weight, labels[:, 1:], bias, **logit_options).logprobs.sum(-1)


def plain_linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "policy_ref",
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    **logit_options: Any,
) -> Tensor:
    """sum_v p_v (log p_v - log q_v). In float64 the cancellation costs 1e-15 nats, which is nothing even at 1e-8."""
    if mask is not None:
        hidden, ref_hidden = (torch.where(mask[..., None], h, torch.zeros_like(h)) for h in (hidden, ref_hidden))
    own = {"logit_scale": ref_logit_scale, "logit_softcap": ref_logit_softcap}
    ref_options = logit_options | {key: value for key, value in own.items() if value is not None}
    policy = plain_logits(hidden, weight, bias, **logit_options)
    ref = plain_logits(ref_hidden, ref_weight, ref_bias, **ref_options)
    log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
    if direction == "ref_policy":
        log_p, log_q = log_q, log_p
    difference = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    kl = (log_p.exp() * difference).sum(-1)
    return kl if mask is None else kl.where(mask, torch.zeros_like(kl))


# --- tolerances ---


def assert_no_worse_than_eager(
    kernel: Tensor, eager: Tensor, truth: Tensor, what: str = "value", *, slack: float = 1.0
) -> None:
    """max |kernel - truth| <= (2 max |eager - truth| + 1e-6) slack, both against fp64 on the same inputs.

    fp32 eager torch is what people train with today, so its errors in this very tensor are errors nobody has missed;
    the factor 2 covers another order of summation and the 1e-6 the few ulps of results of size 1 to 10. A search over
    thousands of tiny inputs needs some `slack`: it finds those where eager was lucky. Infinities must agree exactly;
    NaN is never right.
    """
    assert kernel.shape == truth.shape, f"{what}: shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    infinite = truth.isinf()
    assert torch.equal(kernel.double()[infinite], truth[infinite]), f"{what}: infinities differ from the truth's"
    if not infinite.all():  # nor empty
        worst, allowed = ((x.double() - truth)[~infinite].abs().max().item() for x in (kernel, eager))
        limit = (2 * allowed + 1e-6) * slack
        assert worst <= limit, f"{what}: off by {worst:.2e}, eager by {allowed:.2e}, limit {limit:.2e}"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; the difference itself where the truth is zero or below
    1e-20, where fp32 exponentials of the probabilities behind it underflow."""
    difference, norm = (value.double() - truth.double()).norm().item(), truth.double().norm().item()
    return difference / norm if norm > 1e-20 else difference


def gradient_limit(eager_error: float, *dtypes: torch.dtype) -> float:
    """How far a gradient may be from the truth, relative to its Frobenius norm, given the dtypes it passed through.

    fp32: twice eager's error + 1e-6, as for values. A 16-bit GEMM reads logit gradients rounded once to its dtype,
    and the result is rounded once more to the leaf's: two roundings of relative size 2^-9 (bfloat16, 8 bits) or 2^-12
    (float16, 11 bits) with random signs come to at most 4e-3 and 6e-4. Accumulating in 16 bits exceeds that. Where
    fp32 eager is worse than half of it (the gradient of a tiny KL), the noise is in the fp32 logits themselves.
    """
    rounding = 4e-3 if torch.bfloat16 in dtypes else 6e-4 if torch.float16 in dtypes else 0.0
    return max(rounding, 2 * eager_error + 1e-6)


def kl_relative_limit(kl: Tensor) -> Tensor:
    """How far a small KL may be off, relative to itself: 5% at 1e-8 nats, 1% at 1e-6, 0.2% from 1e-4. Logits of size 1
    to 10 carry fp32 errors of 1e-6, which blur the differences of 1e-4 behind a KL of 1e-8 by 1%; subtracting
    log-probabilities and summing would be off by 100% there."""
    return torch.where(kl < 1e-6, 0.05, torch.where(kl < 1e-4, 0.01, 0.002))


# --- the judgement of an op: forward and backward, against truth and eager ---


def leaves_of(tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> list[Any]:
    """Fresh autograd leaves of the same values, in `dtype` if that is not None; strides, expansions and Nones are
    kept."""
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(outputs: Sequence[Tensor], upstreams: Sequence[Tensor], leaves: Sequence[Tensor | None]) -> list[Any]:
    """d sum(output * upstream) / d leaf for every leaf; None where the leaf is None."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    casted = [u.to(o.dtype) for o, u in zip(outputs, upstreams, strict=True)]
    gradients = iter(torch.autograd.grad(list(outputs), wanted, casted))
    return [None if leaf is None else next(gradients) for leaf in leaves]


def check_gradients(gradients: Sequence[Sequence[Any]], gemm: torch.dtype, slack: float = 1.0) -> None:
    """`gradients`: gradients of hidden, weight and bias of the kernel, of fp32 eager, and in truth. Each of the
    kernel's is inside `slack` times `gradient_limit`, or within twice what storing the truth in its dtype costs: that
    is below the limit but for float16 gradients under 6e-5, which have fewer bits the smaller they are."""
    for name, got, plain, exact in zip(("hidden", "weight", "bias"), *gradients, strict=True):
        if got is None:
            continue
        error, limit = relative_error(got, exact), gradient_limit(relative_error(plain, exact), gemm, got.dtype)
        storing = relative_error(exact.to(got.dtype), exact)
        limit = 1e-12 if gemm == torch.float64 else max(limit * slack, 2 * storing)
        assert error <= limit, f"d/d{name} ({got.dtype}): relative error {error:.2e}, limit {limit:.2e}"


def check_linear_logprobs(
    op: Callable[..., LinearLogprobs],
    head: Head,
    *,
    outputs: Sequence[str] = OUTPUTS,
    upstream: Sequence[str] = DIFFERENTIABLE,
    autocast: torch.dtype | None = None,
    slack: float = 1.0,
    seed: int = 7,
    **options: Any,
) -> None:
    """Judges `op(hidden, weight, targets, bias, outputs=..., **options)`: every output, then the gradient of every leaf
    for random per-token upstream gradients into those of `upstream` that are in `outputs`. `is_top1` is judged where
    the best logit is ahead of the next by more than rounding.

    `autocast` names the dtype that the op is to read hidden and weight in (the caller turns autocast on inside `op`).
    """
    hidden, weight, targets, bias = head
    gemm = autocast or torch.promote_types(hidden.dtype, weight.dtype)
    rounded = (hidden.to(gemm), weight.to(gemm), bias)  # the inputs as the matmul reads them
    leaves, exact_leaves, plain_leaves = (
        leaves_of((hidden, weight, bias)), leaves_of(rounded, torch.float64), leaves_of(rounded, torch.float32),
    )  # fmt: skip
    got = op(leaves[0], leaves[1], targets, leaves[2], outputs=outputs, **options)
    truth, eager = (
        plain_linear_logprobs(x[0], x[1], targets, x[2], dtype=dtype, **options)
        for x, dtype in ((exact_leaves, torch.float64), (plain_leaves, torch.float32))
    )
    logit_options = {key: value for key, value in options.items() if key != "ignore_index"}
    result_dtype = torch.float64 if gemm == torch.float64 else torch.float32
    for name in LinearLogprobs._fields:
        value, plain, exact = (getattr(result, name) for result in (got, eager, truth))
        if name in OUTPUTS and name not in outputs:
            assert value is None, f"{name} is not in outputs"
            continue
        assert value.dtype == result_dtype, f"{name} is {value.dtype}, expected {result_dtype}"
        if name == "is_top1":
            with torch.no_grad():
                z = plain_logits(exact_leaves[0], exact_leaves[1], exact_leaves[2], **logit_options)
            best = z.topk(min(2, z.shape[-1])).values
            decided = (best[..., 0] - best[..., -1] > 1e-5 * best[..., 0].abs()) | (z.shape[-1] == 1)
            assert torch.equal(value[decided].double(), exact[decided]), "is_top1 differs from the argmax"
        elif gemm == torch.float64:
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_no_worse_than_eager(value.detach(), plain.detach(), exact.detach(), name, slack=slack)

    through = [name for name in upstream if name not in OUTPUTS or name in outputs]
    ups = [randn(*targets.shape, seed=seed + i, device=hidden.device) for i, _ in enumerate(through)]
    pairs = ((got, leaves), (eager, plain_leaves), (truth, exact_leaves))
    of_all = [gradients([getattr(result, name) for name in through], ups, of) for result, of in pairs]
    assert all(
        a is b is None or (a.dtype, a.shape) == (b.dtype, b.shape) for a, b in zip(of_all[0], leaves, strict=True)
    )
    check_gradients(of_all, gemm, slack)


def check_linear_kl(
    op: Callable[..., Tensor],
    inputs: KLInputs,
    *,
    upstream_scale: float = 1.0,
    slack: float = 1.0,
    seed: int = 7,
    **options: Any,
) -> Tensor:
    """Judges `op(hidden, weight, ref_hidden, ref_weight, mask, bias=, ref_bias=, **options)`: non-negative, as close to
    the truth as eager, and as `kl_relative_limit` asks; then the policy's gradients. Returns the true KL.

    `upstream_scale` is a loss scaler's: float16 cannot hold the gradients of a KL of 1e-8 without one.
    """
    hidden, weight, ref_hidden, ref_weight, mask, bias, ref_bias = inputs
    gemm = torch.promote_types(hidden.dtype, weight.dtype)
    kls, grads = [], []
    upstream = randn(*hidden.shape[:-1], seed=seed, device=hidden.device) * upstream_scale
    for function, dtype in ((op, None), (plain_linear_kl, torch.float32), (plain_linear_kl, torch.float64)):
        leaves = leaves_of((hidden, weight, bias), dtype)
        extra: dict[str, Any] = options if dtype is None else {**options, "dtype": dtype}
        kl = function(leaves[0], leaves[1], ref_hidden, ref_weight, mask, bias=leaves[2], ref_bias=ref_bias, **extra)
        kls.append(kl.detach())
        grads.append(gradients([kl], [upstream], leaves))
        assert all(a is b is None or a.dtype == b.dtype for a, b in zip(grads[-1], leaves, strict=True))
    got, eager, truth = kls
    assert got.dtype == (torch.float64 if torch.float64 in (gemm, ref_hidden.dtype) else torch.float32)
    assert not (got < 0).any(), f"negative KL: {got.min().item():.2e}"
    assert_no_worse_than_eager(got, eager, truth, "kl", slack=slack)
    near = truth < 1e-2  # further out, twice eager's error says more
    excess = (got.double() - truth).abs() - slack * (kl_relative_limit(truth) * truth + 1e-10)
    wrong = near & (excess > 0)
    assert not wrong.any(), f"kl: {got[wrong]} where the truth is {truth[wrong]}"
    check_gradients(grads, gemm, slack)
    return truth
