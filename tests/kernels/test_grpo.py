"""grpo_loss: each variant against its formula, its gradient in closed form, the KL, the sampler's weights, batches in
parts, extreme ratios, masks. Wrong use is in test_grpo_errors.py."""

import itertools
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "sapo"]
BOUNDED = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")  # by the ratio's clipping
EXTRAS = ["", "k3", "kl", "weights", "k3 and weights"]
OF_TOKENS = ["dapo", "cispo"]  # the mean is over tokens
CAP, MAX_LENGTH = 1.25, 20


def paper(variant, new, old, advantages, mask, *, low=0.2, high=0.2, kl=None, beta=0.0, sampler=None, cap=CAP):
    """The papers' formulas, sequence by sequence and token by token, in fp64."""

    def clipped(r, a):
        return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)

    def weight(log):
        return log.exp().clamp(max=cap)

    rows, lengths = [], mask.sum(-1).tolist()
    for b, n in enumerate(lengths):
        if n == 0:
            rows.append(new.new_zeros(()))
            continue
        pi, pi_old, a = new[b][mask[b]], old[b][mask[b]], advantages[b]
        off = torch.zeros_like(pi_old) if sampler is None else pi_old - sampler[b][mask[b]]
        if variant in ("grpo", "dr_grpo", "dapo"):
            terms = sum(clipped((p - q).exp(), a) * weight(o) for p, q, o in zip(pi, pi_old, off, strict=True))
        elif variant == "sapo":
            tau = 1.0 if a > 0 else 1.05
            gates = [torch.sigmoid(tau * ((p - q).exp() - 1)) * 4 / tau for p, q in zip(pi, pi_old, strict=True)]
            terms = sum(-gate * a * weight(o) for gate, o in zip(gates, off, strict=True))
        elif variant == "cispo":
            ratios = (pi - pi_old).exp().clamp(1 - low, 1 + high).detach()
            terms = sum(-r * a * p * weight(o) for r, p, o in zip(ratios, pi, off, strict=True))
        elif variant == "reinforce":
            terms = sum(-a * p * weight(o) for p, o in zip(pi, off, strict=True))
        elif variant == "rloo":  # pi(y) / pi_old(y) of the whole response
            terms = clipped((pi.sum() - pi_old.sum()).exp(), a) * weight(off.sum())
        else:  # gspo: (pi(y) / pi_old(y))^(1 / n); times n, as it is divided by n below
            terms = clipped((pi.sum() - pi_old.sum()).div(n).exp(), a) * weight(off.mean()) * n
        penalty = kl[b][mask[b]].sum() if beta else 0.0
        rows.append(terms + beta * penalty)
    if variant in OF_TOKENS:
        return sum(rows) / max(sum(lengths), 1)
    divisors = {"grpo": lengths, "sapo": lengths, "gspo": lengths, "dr_grpo": [MAX_LENGTH] * len(rows)}.get(
        variant, [1] * len(rows)
    )
    return sum(row / max(n, 1) for row, n in zip(rows, divisors, strict=True)) / len(rows)


def make(b=6, t=9, *, dtype=torch.float32, device="cpu"):
    """logprobs, old_logprobs, sampler_logprobs and ref_logprobs [B, T], advantages [B], mask; one row has no token."""
    old = -3 * T.randn(b, t, seed=1, dtype=torch.float64).abs()
    new, sampler, ref = (old + s * T.randn(b, t, seed=i, dtype=torch.float64) for i, s in enumerate((0.4, 0.2, 0.8), 2))
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(5)) < 0.67
    if b > 2:
        mask[2] = False
    advantages = T.randn(b, seed=6, dtype=torch.float64)
    return *(x.to(device, dtype) for x in (new, old, sampler, ref, advantages)), mask.to(device)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(
    ("variant", "extras", "clips", "dtype"),
    every_pair(VARIANTS, EXTRAS, [(0.2, 0.2), (0.1, 0.28), (0.05, 0.05)], DTYPES),
)
def test_values_and_gradients(device, variant, extras, clips, dtype):
    new, old, sampler, ref, advantages, mask = make(dtype=dtype, device=device)
    own_kl = (T.randn(*mask.shape, seed=7, device=device).abs()).to(dtype)
    leaves, exact = T.leaves_of((new, own_kl)), T.leaves_of((new, own_kl), torch.float64)
    options, truths = {}, {}
    if "k" in extras.split(" ")[0]:
        log_r = ref.double() - exact[0]
        options = {"beta": 0.3} | ({"kl": leaves[1]} if extras == "kl" else {"ref_logprobs": ref})
        truths = {"beta": 0.3, "kl": exact[1] if extras == "kl" else log_r.exp() - 1 - log_r}
    if "weights" in extras:
        options, truths = options | {"sampler_logprobs": sampler, "is_cap": CAP}, truths | {"sampler": sampler.double()}
    got = rk.grpo_loss(
        leaves[0], old, advantages, mask, variant=variant, clip_low=clips[0], clip_high=clips[1],
        max_length=MAX_LENGTH, **options,
    )  # fmt: skip
    plain = (exact[0], old.double(), advantages.double(), mask)
    truth = paper(variant, *plain, low=clips[0], high=clips[1], **truths)
    assert got.dtype == torch.float32 and got.shape == ()
    torch.testing.assert_close(got.double(), truth, rtol=5e-6, atol=5e-6)
    used = 2 if extras == "kl" else 1
    grads, wants = torch.autograd.grad(got, leaves[:used]), torch.autograd.grad(truth, exact[:used])
    for grad, want in zip(grads, wants, strict=True):
        assert want.norm() > 0 and grad.dtype == dtype
        assert T.relative_error(grad, want) <= T.gradient_limit(2e-6, dtype)
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "delta", "sequence"])
def test_trl_computes_the_same(device, loss_type):
    """TRL 1.16's `_compute_loss` written down again, with its names: epsilon_high of cispo is the bound itself, and
    importance_sampling_level="sequence" with loss_type="grpo" is GSPO."""
    new, old, sampler, ref, advantages, mask = make(dtype=torch.float64, device=device)
    beta, epsilon_low, epsilon_high, cap, delta = 0.04, 0.2, 0.28, 2.0, 1.5
    (leaf,) = T.leaves_of((new,))
    counts, adv = mask.sum(-1).clamp(min=1), advantages[:, None]
    log_weights = leaf - old
    if loss_type == "sequence":
        log_weights = ((log_weights * mask).sum(-1) / counts)[:, None]
    coef_1 = log_weights.exp()
    if loss_type == "cispo":
        per_token = -coef_1.clamp(max=1 + epsilon_high).detach() * adv * leaf
    elif loss_type == "sapo":
        temperatures = torch.where(adv > 0, 1.0, torch.tensor(1.05, dtype=torch.float64))
        per_token = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * adv
    elif loss_type == "delta":
        bounded = coef_1.clamp(max=delta)
        per_token = -torch.min(bounded * adv, coef_1.clamp(1 - epsilon_low, 1 + epsilon_high) * adv)
    else:
        per_token = -torch.min(coef_1 * adv, coef_1.clamp(1 - epsilon_low, 1 + epsilon_high) * adv)
    weighed = loss_type != "sequence"  # there TRL weighs a sequence by the mean of its tokens' weights
    if weighed:
        per_token = per_token * (old - sampler).exp().clamp(max=cap)
    per_token = (per_token + beta * ((ref - leaf).exp() - (ref - leaf) - 1)) * mask
    want = {
        "dr_grpo": per_token.sum() / (len(mask) * MAX_LENGTH),
        "dapo": per_token.sum() / mask.sum(),
        "cispo": per_token.sum() / mask.sum(),
    }.get(loss_type, (per_token.sum(-1) / counts).mean())
    got = rk.grpo_loss(
        leaf, old, advantages, mask, variant={"sequence": "gspo", "delta": "grpo"}.get(loss_type, loss_type),
        ref_logprobs=ref, dual_clip=delta if loss_type == "delta" else None,
        beta=beta, clip_low=1.0 if loss_type == "cispo" else epsilon_low, clip_high=epsilon_high,
        sampler_logprobs=sampler if weighed else None, is_cap=cap if weighed else None, max_length=MAX_LENGTH,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(got, leaf), gradient(want, leaf), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_policy_every_variant_has_the_policy_gradient(device, variant):
    """-A grad log pi of every token, and the variant's own mean. `logprobs` may be given as old_logprobs too."""
    new, _, _, _, advantages, mask = make(device=device)
    leaf = new.requires_grad_()
    got = gradient(rk.grpo_loss(leaf, leaf, advantages, mask, variant=variant, max_length=MAX_LENGTH), leaf)
    lengths, size = mask.sum(-1, keepdim=True), len(mask)
    shares = dict.fromkeys(("grpo", "gspo", "sapo"), 1 / (size * lengths)) | {"dr_grpo": 1 / (size * MAX_LENGTH)}
    share = 1 / mask.sum() if variant in OF_TOKENS else shares.get(variant, 1 / size)
    torch.testing.assert_close(got, torch.where(mask, -advantages[:, None] * share, 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["grpo", "gspo", "rloo", "cispo"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_by_hand(device, variant, sign):
    """Two tokens with ratios 2 and 1/2, or 2 and 1, under bounds of 1/2 and 3/2."""
    log_2, a = math.log(2), 3.0 * sign
    for second in (-log_2, 0.0):
        x = torch.tensor([[log_2, second]], device=device, requires_grad=True)
        mask = torch.ones(1, 2, dtype=torch.bool, device=device)
        loss = rk.grpo_loss(
            x, torch.zeros_like(x), torch.tensor([a], device=device), mask, variant=variant, clip_low=0.4, clip_high=0.5
        )
        r = [2.0, math.exp(second)]
        if variant == "grpo":
            held = [sign > 0, sign < 0 and r[1] < 0.6]
            want = [0.0 if h else -a * q / 2 for h, q in zip(held, r, strict=True)]
        elif variant == "cispo":  # all have a gradient, of the bounded weight
            want = [-a * min(max(q, 0.6), 1.5) / 2 for q in r]
        else:
            s = math.prod(r) ** (0.5 if variant == "gspo" else 1)  # 1, or sqrt(2) of gspo and 2 of rloo
            want = [0.0 if sign > 0 and s > 1.5 else -a * s * (0.5 if variant == "gspo" else 1)] * 2
        assert gradient(loss, x)[0].tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("variant", ["rloo", "reinforce"])
def test_the_expectation_over_all_sequences_is_the_gradient_of_the_expected_reward(device, variant):
    """Nine sequences of two tokens of three, each weighed by the probability that it is sampled with: no sampling. rloo
    without its bounds is exact for samples of another policy, too, which reinforce is not, nor says so."""
    logits, others = (T.randn(4, 3, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)), device=device)
    rewards = T.randn(9, seed=3, dtype=torch.float64, device=device)

    def token_logprobs(table):  # the first token from row 0, the second from the row of the first
        first = table[0].log_softmax(-1)[sequences[:, 0]]
        return torch.stack([first, table[1:].log_softmax(-1)[sequences[:, 0], sequences[:, 1]]], dim=1)

    logits.requires_grad_()
    want = -gradient((token_logprobs(logits).sum(-1).exp() * rewards).sum(), logits)
    for sampler, exact in ((logits.detach(), True), (others, variant == "rloo")):
        old = token_logprobs(sampler)
        advantages = 9 * old.sum(-1).exp() * rewards  # undoes the mean over nine
        mask = torch.ones_like(old, dtype=torch.bool)
        loss = rk.grpo_loss(
            token_logprobs(logits), old, advantages, mask, variant=variant, clip_low=1.0, clip_high=math.inf
        )
        assert torch.allclose(gradient(loss, logits), want, rtol=1e-12, atol=1e-12) == exact


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_in_parts_is_the_whole_batch(device, variant):
    """The parts differ in size and length; one has no token at all."""
    new, old, sampler, ref, advantages, mask = make(11, 9, dtype=torch.float64, device=device)
    mask[5:7] = False
    leaf, tensors = new.requires_grad_(), (old, advantages, mask, ref, sampler)

    def loss(rows):
        o, a, m, r, s = (x[rows] for x in tensors)
        return rk.grpo_loss(
            leaf[rows], o, a, m, variant=variant, ref_logprobs=r, beta=0.2, sampler_logprobs=s, is_cap=CAP,
            max_length=MAX_LENGTH,
        )  # fmt: skip

    counts = rk.grpo_loss_weights(mask, variant)
    assert counts.dtype == torch.float32
    assert counts.tolist() == (mask.sum(-1).tolist() if variant in OF_TOKENS else [1.0] * 11)
    parts = [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 11)]
    whole = loss(slice(None))
    summed = sum(loss(part) * (counts[part].sum() / counts.sum()).double() for part in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-7)  # the counts' quotient is fp32
    torch.testing.assert_close(gradient(summed, leaf), gradient(whole, leaf), rtol=1e-6, atol=1e-8)
    plain_mean = sum(loss(part) for part in parts) / len(parts)
    assert not torch.allclose(plain_mean, whole, rtol=1e-3)


def test_a_kl_of_the_callers_own_has_its_gradient(device):
    """The exact KL, through to the hidden states."""
    hidden, weight, ref_hidden = (
        T.randn(*s, seed=i, device=device) for i, s in enumerate([(2, 4, 8), (11, 8), (2, 4, 8)])
    )
    targets = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]], device=device)
    hidden.requires_grad_()
    advantages = torch.tensor([1.0, -1.0], device=device)
    logprobs = rk.linear_logprobs(hidden, weight, targets).logprobs
    kl = rk.linear_kl(hidden, weight, ref_hidden, weight)
    policy = rk.grpo_loss(logprobs, logprobs, advantages, mask)
    both = rk.grpo_loss(logprobs, logprobs, advantages, mask, kl=kl, beta=0.5)
    want = 0.5 * (kl[0, :2].mean() + kl[1].mean()) / 2
    torch.testing.assert_close(both - policy, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (both, policy, want)]
    torch.testing.assert_close(grads[0] - grads[1], grads[2], rtol=1e-4, atol=1e-6)


def test_the_samplers_weights_leave_the_kl_alone(device):
    new, old, _, ref, advantages, mask = make(device=device)
    sampler = old + 50.0  # weights of e^-50: nothing is left of the policy's term
    leaf = new.requires_grad_()
    for variant in VARIANTS:
        options = {"variant": variant, "ref_logprobs": ref, "beta": 0.5, "max_length": MAX_LENGTH}
        alone = rk.grpo_loss(leaf, old, advantages * 0, mask, **options)
        got = rk.grpo_loss(leaf, old, advantages, mask, sampler_logprobs=sampler, is_cap=2.0, **options)
        torch.testing.assert_close(got, alone)
        torch.testing.assert_close(gradient(got, leaf), gradient(alone, leaf))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sampler_that_agrees_changes_nothing(device, variant):
    new, old, _, _, advantages, mask = make(device=device)
    options = {"variant": variant, "max_length": MAX_LENGTH}
    plain = rk.grpo_loss(new, old, advantages, mask, **options)
    assert torch.equal(rk.grpo_loss(new, old, advantages, mask, sampler_logprobs=old, is_cap=1.0, **options), plain)


def test_only_the_policy_and_the_callers_kl_have_a_gradient(device):
    new, old, sampler, ref, advantages, mask = make(device=device)
    for variant in VARIANTS:
        leaves = T.leaves_of((new, old, advantages, ref, sampler))
        rk.grpo_loss(
            *leaves[:3], mask, variant=variant, ref_logprobs=leaves[3], beta=0.1, sampler_logprobs=leaves[4],
            is_cap=2.0, max_length=MAX_LENGTH,
        ).backward()  # fmt: skip
        assert leaves[0].grad is not None and all(leaf.grad is None for leaf in leaves[1:])


# log r, A, then loss and gradient of one sequence of one token with ratio bounds 0.8 and 1.2
EXTREMES = [
    (1e4, 1.0, -1.2, 0.0),
    (-1e4, 1.0, 0.0, 0.0),
    (-1e4, -1.0, 0.8, 0.0),
    (1e4, 0.0, 0.0, 0.0),  # not 0 times infinity
    (1e4, -1.0, math.inf, math.inf),  # the formula's own
]


@pytest.mark.parametrize("variant", BOUNDED)
@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), EXTREMES)
def test_extreme_ratios(device, variant, ratio, advantage, loss, slope):
    x = torch.tensor([[ratio]], device=device, requires_grad=True)
    mask, zero = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, 1, device=device)
    options = {"variant": variant, "max_length": 1, "sampler_logprobs": zero, "is_cap": 1.0}
    got = rk.grpo_loss(x, zero, torch.tensor([advantage], device=device), mask, **options)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert gradient(got, x).item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("logprob", [0.0, -1e4])
@pytest.mark.parametrize("old", [0.0, -1e4])
def test_extreme_ratios_of_cispo_and_reinforce_are_bounded_weights(device, old, logprob, advantage):
    x = torch.tensor([[logprob]], device=device, requires_grad=True)
    arguments = torch.tensor([[old]], device=device), torch.tensor([advantage], device=device), x.detach() < 1
    bounded = math.exp(min(max(logprob - old, math.log(0.8)), math.log(1.2)))
    for variant, weight in (("cispo", bounded), ("reinforce", 1.0)):
        loss = rk.grpo_loss(x, *arguments, variant=variant)
        assert loss.item() == pytest.approx(-weight * advantage * logprob, rel=1e-6)
        assert gradient(loss, x).item() == pytest.approx(-weight * advantage, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_advantage_nothing_infinite_counts(device, variant):
    """Tokens that the policy cannot say, and ratios and weights without bounds: 0 times each of them is NaN."""
    x = torch.tensor([[-math.inf, 0.0]], device=device, requires_grad=True)
    old, zero = torch.tensor([[0.0, -1e4]], device=device), torch.zeros(1, device=device)
    loss = rk.grpo_loss(
        x, old, zero, old <= 0, variant=variant, clip_high=math.inf, sampler_logprobs=old - 1e4, is_cap=math.inf,
        max_length=2,
    )  # fmt: skip
    assert loss.item() == 0 and (gradient(loss, x) == 0).all()


def test_a_weight_of_zero_does_not_meet_an_infinite_ratio(device):
    """log r = 1e4 and a weight of e^-1e4: the product is 1, while either factor is outside of fp32."""
    x = torch.tensor([[1e4]], device=device, requires_grad=True)
    zero, mask = torch.zeros(1, 1, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    for variant in ("grpo", "gspo", "rloo"):
        loss = rk.grpo_loss(x, zero, -zero[0] - 1, mask, variant=variant, sampler_logprobs=zero + 1e4, is_cap=2.0)
        assert loss.item() == 1.0 and gradient(loss, x).item() == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_where_masked_does_not_leak(device, variant, bad):
    *tensors, advantages, mask = make(device=device)
    options = {"variant": variant, "beta": 0.1, "is_cap": 2.0, "max_length": MAX_LENGTH}

    def loss(new, old, sampler, ref, advantages, kl=None):
        kls = {"ref_logprobs": ref} if kl is None else {"kl": kl}
        return rk.grpo_loss(new, old, advantages, mask, sampler_logprobs=sampler, **kls, **options)

    want = loss(*tensors, advantages)
    for which in range(5):
        dirty = [x.clone() for x in (*tensors, advantages)]
        dirty[which][~mask if which < 4 else ~mask.any(-1)] = bad
        leaf = dirty[0].requires_grad_()
        got = loss(leaf, *dirty[1:])
        grad = gradient(got, leaf)
        assert torch.equal(got, want) and (grad[~mask] == 0).all() and grad.isfinite().all()
    kl = torch.where(mask, 1.0, bad).requires_grad_()
    grad = gradient(loss(*tensors, advantages, kl), kl)
    assert (grad[~mask] == 0).all() and (grad[mask] > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0, 0)])  # all masked; no row; no token; neither
def test_nothing_that_counts_is_0_with_zero_gradient(device, variant, shape):
    leaf = torch.full(shape, math.nan, device=device, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    loss = rk.grpo_loss(
        leaf, leaf, torch.full(shape[:1], math.nan, device=device), mask, variant=variant, ref_logprobs=leaf, beta=0.1,
        sampler_logprobs=leaf, is_cap=2.0, max_length=MAX_LENGTH,
    )  # fmt: skip
    assert loss.item() == 0 and (gradient(loss, leaf) == 0).all()
    assert rk.grpo_loss_weights(mask, variant).shape == shape[:1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_token_is_not_hidden(device, variant):
    new, old, _, _, advantages, mask = make(device=device)
    new[0, mask[0].nonzero()[0]] = math.nan
    assert rk.grpo_loss(new, old, advantages, mask, variant=variant, max_length=MAX_LENGTH).isnan()


def test_at_beta_0_no_kl_is_read(device):
    new, old, _, ref, advantages, mask = make(device=device)
    want = rk.grpo_loss(new, old, advantages, mask)
    for options in ({"ref_logprobs": ref * math.nan}, {"kl": ref + math.inf}):
        assert torch.equal(rk.grpo_loss(new, old, advantages, mask, **options), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts(device, variant):
    new, old, sampler, ref, advantages, mask = make(12, 10, device=device)

    def loss(cut):
        n, o, s, r, m = (cut(x) for x in (new, old, sampler, ref, mask))
        return rk.grpo_loss(
            n, o, advantages[::2], m, variant=variant, ref_logprobs=r, beta=0.1, sampler_logprobs=s, is_cap=2.0,
            max_length=MAX_LENGTH,
        )  # fmt: skip

    torch.testing.assert_close(loss(lambda x: x[::2, 1::3]), loss(lambda x: x[::2, 1::3].contiguous()))


@pytest.mark.filterwarnings("ignore:rlhf_kernels falls back")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_value_is_read(variant):
    """Tensors without values: on a GPU, reading one would wait for all that was queued before."""
    new, old, sampler, ref, advantages, mask = make(device="meta")
    leaf = new.requires_grad_()
    loss = rk.grpo_loss(
        leaf, old, advantages, mask, variant=variant, ref_logprobs=ref, beta=0.1, sampler_logprobs=sampler, is_cap=2.0,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    per_token = rk.ppo_loss(leaf, old, ref, mask, dual_clip=2.0) + rk.value_loss(leaf, old, ref, mask)
    share = rk.clip_fraction(leaf, old, advantages, mask).low * rk.grpo_loss_weights(mask, variant).sum()
    assert gradient(loss + per_token.sum() * share, leaf).shape == mask.shape
