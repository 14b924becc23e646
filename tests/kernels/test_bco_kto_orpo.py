"""bco_loss, kto_loss, orpo_loss: against their papers' formulas, where sigma is flat and at both ends of the
probabilities, by hand, and what each of them alone promises."""

import math

import mpmath  # comes with torch: sympy is made of it
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOG3 = math.log(3)  # sigma of it and of its negative: 3/4 and 1/4


# Response by response, of a log-ratio r and whether it is desirable.
def paper_bco(r, good, shift, beta):
    """Jung et al. (2024): -log sigma(r - delta) or -log sigma(-(r - delta)), of the reward r."""
    logit = beta * r - shift
    return -torch.log(torch.sigmoid(logit if good else -logit))


def paper_kto(r, good, kl, beta, weight_d=1.0, weight_u=1.0):
    """Ethayarajh et al. (2024), eq. 8: lambda_y - v(x, y)."""
    if good:
        return weight_d - weight_d * torch.sigmoid(beta * (r - kl))
    return weight_u - weight_u * torch.sigmoid(beta * (kl - r))


UNPAIRED = {"bco": (rk.bco_loss, paper_bco), "kto": (rk.kto_loss, paper_kto)}


def paper_orpo(m, chosen, rejected, beta):
    """Hong et al. (2024), eq. 4, 6 and 7, of mean log-probs: odds(p) = p / (1 - p), L_SFT + beta L_OR. `m` is torch,
    which takes fp64 tensors, or mpmath, which has more digits and no overflow."""
    odds_w, odds_l = (m.exp(mean) / (1 - m.exp(mean)) for mean in (chosen, rejected))
    ratio = odds_w / odds_l
    return -chosen - beta * m.log(ratio / (1 + ratio)), m.log(ratio)  # sigma(log x) = x / (1 + x)


def make(size, *, dtype=torch.float32, device="cpu"):
    """Log-probs in steps of 1/64 nat, whose differences are exact in fp32; two fifths are desirable."""
    policy, ref = ((T.randn(size, seed=s, dtype=torch.float64) * 4 - 20).mul(64).round() / 64 for s in (1, 2))
    desirable = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.4
    return policy.to(device, dtype), ref.to(device, dtype), desirable.to(device)


def make_pairs(size, pairs, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 30, (size,), generator=generator).to(device)
    means = -0.02 - 3 * torch.rand(size, generator=generator, dtype=torch.float64).to(device)
    chosen, rejected = (torch.randint(max(size, 1), (pairs,), generator=generator).to(device) for _ in range(2))
    return (means * counts).to(dtype), counts, chosen, rejected


def check_gradients(losses, truth, upstream, leaves, exact):
    grads, wants = T.gradients([losses], [upstream], leaves), T.gradients([truth], [upstream], exact)
    for leaf, grad, want in zip(leaves, grads, wants, strict=True):
        assert grad.dtype == leaf.dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, leaf.dtype)


# --- bco and kto: single responses, each desirable or not ---


CALLS = [  # loss, shift, and what follows it: beta, weights
    ("bco", 0.0, (0.1,)),
    ("bco", 0.5, (1.0,)),
    ("bco", -2.0, (0.5,)),
    ("kto", 0.75, (0.1,)),
    ("kto", 0.75, (1.0,)),
    ("kto", 0.75, (0.5, 1.33, 0.25)),
]


@pytest.mark.parametrize(("call", "size", "dtype"), every_pair(CALLS, [0, 1, 7, 1000], DTYPES))
def test_values_and_gradients_of_single_responses(device, call, size, dtype):
    name, shift, options = call
    loss, paper = UNPAIRED[name]
    policy, ref, desirable = make(size, dtype=dtype, device=device)
    upstream, shift = T.randn(size, seed=4, device=device), torch.tensor(shift, device=device)
    leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
    got = loss(*leaves, desirable, shift, *options)
    ratios = exact[0] - exact[1]
    responses = [paper(r, good, shift, *options) for r, good in zip(ratios, desirable.tolist(), strict=True)]
    truth = torch.stack(responses) if size else ratios
    assert got.losses.dtype == got.rewards.dtype == torch.float32 and got.losses.shape == (size,)
    torch.testing.assert_close(got.losses.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.rewards.double(), options[0] * ratios.detach(), rtol=1e-6, atol=1e-6)
    assert not got.rewards.requires_grad
    if size:
        check_gradients(got.losses, truth, upstream, leaves, exact)


@pytest.mark.parametrize(
    ("name", "options", "logprobs", "losses", "slopes"),
    [  # beta multiplies the log-ratio, not the shift of bco
        ("bco", (0.5,), (4 * LOG3, 0.0), [-math.log(x / 4) for x in (3, 1, 1, 3)], (-0.5 / 4, -0.5 * 3 / 4)),
        ("kto", (1.0, 2.0, 3.0), (2 * LOG3, 0.0), [2 / 4, 2 * 3 / 4, 3 * 3 / 4, 3 / 4], (-2 * 3 / 16, -2 * 3 / 16)),
    ],
)
def test_single_responses_by_hand(device, name, options, logprobs, losses, slopes):
    """beta r - delta or beta (r - kl) = log 3 and -log 3, desirable and not."""
    policy = torch.tensor([*logprobs, *logprobs], device=device).sub(4.0).requires_grad_()
    ref, shift = torch.full((4,), -4.0, device=device), torch.tensor(LOG3, device=device)
    desirable = torch.tensor([True, True, False, False], device=device)
    got, rewards = UNPAIRED[name][0](policy, ref, desirable, shift, *options)
    assert got.tolist() == pytest.approx(losses, rel=1e-6)
    assert rewards.tolist() == pytest.approx([2 * LOG3, 0.0, 2 * LOG3, 0.0], rel=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), policy)
    undesirable = (0.5 * 3 / 4, 0.5 / 4) if name == "bco" else (3 * 3 / 16, 3 * 3 / 16)
    assert grad.tolist() == pytest.approx([*slopes, *undesirable], rel=1e-6)


@pytest.mark.parametrize("name", UNPAIRED)
def test_the_shift_gets_no_gradient(device, name):
    policy, ref, desirable = make(7, device=device)
    shift = torch.tensor(0.5, device=device, requires_grad=True)
    UNPAIRED[name][0](policy.requires_grad_(), ref, desirable, shift).losses.sum().backward()
    assert shift.grad is None and (policy.grad != 0).all()


def test_the_kl_of_kto_is_clamped_at_0(device):
    policy, ref, desirable = make(7, device=device)
    kls = torch.tensor([-3.0, 0.0, 2.0], device=device)
    below, zero, above = (rk.kto_loss(policy, ref, desirable, kl).losses for kl in kls)
    assert torch.equal(below, zero) and not torch.equal(zero, above)


def test_a_pair_of_bco_sums_to_at_least_the_dpo_loss(device):
    """The paper's theorem 1; closest where the shift is half way between the two rewards."""
    policy, ref, _ = make(40, dtype=torch.float64, device=device)
    won, lost = torch.arange(20, device=device), torch.arange(20, 40, device=device)
    dpo, rewards = rk.dpo_loss(policy, ref, won, lost, 0.3)
    desirable = torch.arange(40, device=device) < 20

    def gap(shift):
        losses = torch.stack([rk.bco_loss(policy, ref, desirable, s, 0.3).losses for s in shift])
        pairs = range(len(won))
        return losses[pairs, won] + losses[pairs, lost] - dpo

    half_way = (rewards[won] + rewards[lost]) / 2
    assert (gap(half_way) > 0).all()
    for step in (-0.1, 0.1):
        assert (gap(half_way + step) > gap(half_way)).all()


@pytest.mark.parametrize("ratio", [1e4, -1e4, 30.0, -30.0, 80.0, -80.0])  # sigma(17) rounds to 1 in fp32
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", UNPAIRED)
def test_extreme_log_ratios(device, name, good, ratio):
    """A response on the flat side of sigma still has a slope, e^-|x|, which 1 - sigma(x) in fp32 loses."""
    leaf = torch.tensor([ratio], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    losses, _ = UNPAIRED[name][0](leaf, zero, torch.tensor([good], device=device), zero[0], 1.0)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    side, small = -1 if good else 1, math.exp(-abs(ratio))
    wrong, slope = (abs(ratio), 1.0) if name == "bco" else (1.0, small)  # -log sigma(x), 1 - sigma(x)
    right = side * ratio < 0
    assert losses.item() == pytest.approx(small if right else wrong, rel=1e-5, abs=1e-37)
    assert grad.item() == pytest.approx(side * (small if right else slope), rel=1e-5, abs=1e-37)


@pytest.mark.parametrize(
    ("name", "weights", "good", "bad"),
    [("bco", (), math.log(2), math.log(2)), ("kto", (4.0, 2.0), 2.0, 1.0)],  # half the weights
)
def test_beta_0_is_a_constant_without_gradient(device, name, weights, good, bad):
    policy, ref, desirable = make(7, device=device)
    losses, rewards = UNPAIRED[name][0](policy.requires_grad_(), ref, desirable, policy.new_zeros(()), 0.0, *weights)
    torch.testing.assert_close(losses, torch.where(desirable, good, bad))
    assert (rewards == 0).all() and (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_a_bad_response_stays_alone(device, name):
    policy, ref, desirable = make(7, device=device)
    policy[2] = math.nan
    losses, rewards = UNPAIRED[name][0](policy, ref, desirable, policy.new_zeros(()))
    assert losses.isnan().nonzero().tolist() == rewards.isnan().nonzero().tolist() == [[2]]


# --- orpo: pairs without a reference ---


SIZES = [(1, 0), (2, 1), (5, 7), (100, 1000)]  # responses and pairs: none ... many per response


@pytest.mark.parametrize(("sizes", "beta", "dtype"), every_pair(SIZES, [0.1, 1.0], DTYPES))
def test_values_and_gradients_of_orpo(device, sizes, beta, dtype):
    size, pairs = sizes
    policy, counts, chosen, rejected = make_pairs(size, pairs, dtype=dtype, device=device)
    upstream = T.randn(pairs, seed=4, device=device)
    (leaf,), (exact,) = T.leaves_of((policy,)), T.leaves_of((policy,), torch.float64)
    got = rk.orpo_loss(leaf, counts, chosen, rejected, beta)
    means = exact / counts
    truth, log_odds = paper_orpo(torch, means[chosen], means[rejected], beta)
    for value, want in zip(got, (truth, -means[chosen], log_odds, beta * means), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want, rtol=3e-6, atol=3e-6)
    assert got._fields == ("losses", "nll", "log_odds", "rewards")
    assert got.losses.requires_grad and not any(t.requires_grad for t in got[1:])
    if pairs:
        check_gradients(got.losses, truth, upstream, [leaf], [exact])


def test_orpo_by_hand(device):
    """p = 4/5 and 1/2: odds 4 and 1, so sigma(log odds ratio) = 4/5. Two tokens and one."""
    policy = torch.tensor([2 * math.log(4 / 5), math.log(1 / 2)], device=device, requires_grad=True)
    pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
    got = rk.orpo_loss(policy, torch.tensor([2, 1], device=device), *pair, 0.5)
    nll = -math.log(4 / 5)
    assert [x.item() for x in got[:3]] == pytest.approx([nll + 0.5 * nll, nll, math.log(4)], rel=1e-6)
    assert got.rewards.tolist() == pytest.approx([0.5 * math.log(4 / 5), 0.5 * math.log(1 / 2)])
    (grad,) = torch.autograd.grad(got.losses.sum(), policy)
    # d log odds / d m = 1 / (1 - p): 5 and 2, times sigma(-log 4) = 1/5; a token of two has half the mean's slope
    assert grad.tolist() == pytest.approx([(-1 - 0.5 * 5 / 5) / 2, 0.5 * 2 / 5], rel=1e-6)


def test_orpo_at_beta_0_is_fine_tuning_on_the_chosen_responses(device):
    policy, counts, chosen, rejected = make_pairs(6, 9, device=device)
    policy.requires_grad_()
    got = rk.orpo_loss(policy, counts, chosen, rejected, 0.0)
    assert torch.equal(got.losses, got.nll)
    (grad,) = torch.autograd.grad(got.losses.sum(), policy)
    torch.testing.assert_close(grad, -torch.bincount(chosen, minlength=6) / counts)


# Unsure, p = 1/2 with odds of 1, nearly sure, as sure as fp32 can say; and hopeless.
MEANS = [-1.0, -math.log(2), -1e-3, -1e-6, -30.0, -100.0, -1e4]


@pytest.mark.parametrize("rejected", MEANS)
@pytest.mark.parametrize("chosen", MEANS)
def test_extreme_probabilities(device, chosen, rejected):
    leaf = torch.tensor([chosen, rejected], device=device, requires_grad=True)
    pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
    got = rk.orpo_loss(leaf, torch.ones(2, device=device), *pair, 1.0)
    (grad,) = torch.autograd.grad(got.losses.sum(), leaf)
    with mpmath.workdps(100):  # an odds ratio of e^100 leaves 1 - 1e-44
        point = [mpmath.mpf(x) for x in leaf.tolist()]
        log_odds = float(paper_orpo(mpmath, *point, 1)[1])
        orders = ((0, 0), (1, 0), (0, 1))
        want = [float(mpmath.diff(lambda w, r: paper_orpo(mpmath, w, r, 1)[0], point, n)) for n in orders]
    assert got.log_odds.item() == pytest.approx(log_odds, rel=2e-6, abs=2e-6)
    assert got.losses.item() == pytest.approx(want[0], rel=2e-6, abs=1e-37)
    assert grad.tolist() == pytest.approx(want[1:], rel=2e-5, abs=1e-37)


@pytest.mark.parametrize("sure", [0.0, 1e-9, 1e4])  # certain; rounding above it; no log-probability at all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_responses_stay_finite_and_move_the_right_way(device, sure, dtype):
    leaf = torch.tensor([sure, -1.0, sure], device=device, dtype=dtype, requires_grad=True)
    chosen, rejected = torch.tensor([0, 1, 0], device=device), torch.tensor([1, 2, 2], device=device)
    got = rk.orpo_loss(leaf, torch.ones(3, device=device), chosen, rejected, 0.1)
    assert all(t.isfinite().all() for t in got)
    eps = torch.finfo(dtype).eps
    odds = math.log(1 / eps) + math.log(math.expm1(1.0))  # of 1 - eps over those of e^-1
    assert got.log_odds.tolist() == pytest.approx([odds, -odds, 0.0], abs=1e-5)
    certain_won, certain_lost, _ = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in got.losses)
    # p_l / (p_w (1 - p_l) + p_l (1 - p_w)), finite at p_w = 1; and 1 / (1 - p_l), which is not at p_l = 1
    assert certain_won.tolist() == pytest.approx([-1 - 0.1 / math.expm1(1.0), 0.0, 0.0], rel=1e-5, abs=1e-5)
    assert certain_lost[2].item() == pytest.approx(0.1 / eps, rel=1e-5)


def test_an_empty_response_does_not_divide_by_zero(device):
    leaf = torch.tensor([-3.0, 0.0], device=device, requires_grad=True)
    pair = torch.tensor([0, 1], device=device), torch.tensor([1, 0], device=device)
    got = rk.orpo_loss(leaf, torch.tensor([3, 0], device=device), *pair)
    got.losses.sum().backward()
    assert all(t.isfinite().all() for t in (*got, leaf.grad))
