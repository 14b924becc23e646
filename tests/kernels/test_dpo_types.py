"""dpo_loss: the types after sigmoid, hinge, ipo, robust and simpo (test_dpo.py), each against its paper's formula.

They are plain torch whatever the backend, which one test shows; the others leave it at "auto".
"""

import math

import mpmath  # comes with torch: sympy is made of it
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# The papers' formulas as they stand there, of the log-ratios of the chosen
# response, `won`, and of the rejected one, `lost`. `m` is
# torch, which takes fp64 tensors, or mpmath, which has more digits and no overflow.
def sigma(m, x):
    return 1 / (1 + m.exp(-x))


def paper_apo_zero(m, won, lost, beta, eps):
    """D'Oosterlinck et al. (2024), eq. 7."""
    return (1 - sigma(m, beta * won)) + sigma(m, beta * lost)


def paper_apo_down(m, won, lost, beta, eps):
    """D'Oosterlinck et al. (2024), eq. 8."""
    return sigma(m, beta * won) + (1 - sigma(m, beta * won - beta * lost))


def paper_sppo(m, won, lost, beta, eps):
    """Wu et al. (2024), eq. 4.7: (log-ratio - eta (P - 1/2))^2 of both, with eta = 1/beta and P = 1 and 0."""
    return (won - (1 - 0.5) / beta) ** 2 + (lost - (0 - 0.5) / beta) ** 2


def paper_nca(m, won, lost, beta, eps):
    """Chen et al. (2024): -sum_i [e_i log sigma(r_i) + 1/K log sigma(-r_i)], K = 2, e = (1, 0)."""
    rewards, weights = (beta * won, beta * lost), (1, 0)
    return -sum(e * m.log(sigma(m, r)) + m.log(sigma(m, -r)) / 2 for e, r in zip(weights, rewards, strict=True))


def paper_exo(m, won, lost, beta, eps):
    """Ji et al. (2024), eq. 16: KL of the policy's softmax over the pair from (1 - eps, eps)."""
    total = m.exp(beta * won) + m.exp(beta * lost)
    shares = m.exp(beta * won) / total, m.exp(beta * lost) / total
    return sum(q * (m.log(q) - math.log(p)) for q, p in zip(shares, (1 - eps, eps), strict=True))


def paper_discopop(m, won, lost, beta, eps):
    """Lu et al. (2024), eq. 5: (1 - sigma(x / tau)) f_dpo(x) + sigma(x / tau) f_exp(x)."""
    x = beta * (won - lost)
    gate = sigma(m, x / 0.05)
    return (1 - gate) * -m.log(sigma(m, x)) + gate * m.exp(-x)


def paper_sigmoid(m, h, _, beta, eps):
    x = beta * h
    return -(1 - eps) * m.log(sigma(m, x)) - eps * m.log(sigma(m, -x))


PAPERS = {
    "apo_zero": paper_apo_zero, "apo_down": paper_apo_down, "sppo": paper_sppo, "nca": paper_nca, "exo": paper_exo,
    "aot": paper_sigmoid, "discopop": paper_discopop,
}  # fmt: skip
CASES = [  # type, beta, label smoothing
    ("apo_zero", 0.1, 0.0),
    ("apo_zero", 1.0, 0.0),  # many pairs on sigma's flat sides
    ("apo_down", 0.1, 0.0),
    ("apo_down", 1.0, 0.0),
    ("sppo", 0.1, 0.0),
    ("sppo", 2.0, 0.0),
    ("nca", 0.1, 0.0),
    ("nca", 1.0, 0.0),
    ("exo", 0.1, 1e-3),  # the paper's smoothing
    ("exo", 0.5, 0.3),
    ("aot", 0.1, 0.0),
    ("aot", 0.5, 0.2),
    ("discopop", 0.05, 0.0),  # a part of the pairs in the narrow zone where the two losses are mixed
    ("discopop", 0.5, 0.0),
]
TYPES = [(t, eps) for t, _, eps in CASES[1::2]]


def make(size, pairs, *, dtype=torch.float32, device="cpu"):
    """Log-probs in steps of 1/64 nat: their differences are exact in fp32, and so are the ranks and ties of margins.
    No response meets itself, since a gradient of zero has no relative error."""
    policy, ref = ((T.randn(size, seed=s, dtype=torch.float64) * 4 - 20).mul(64).round() / 64 for s in (1, 2))
    generator = torch.Generator().manual_seed(3)
    chosen, further = (torch.randint(max(size - i, 1), (pairs,), generator=generator).to(device) for i in (0, 1))
    return policy.to(device, dtype), ref.to(device, dtype), chosen, (chosen + 1 + further) % size


def paper_losses(loss_type, policy, ref, chosen, rejected, beta, eps):
    won, lost = (policy - ref)[chosen], (policy - ref)[rejected]
    if (
        loss_type == "aot"
    ):  # Melnyk et al. (2024): the k-th smallest margin of the policy less the k-th of the reference
        u, v = policy[chosen] - policy[rejected], ref[chosen] - ref[rejected]
        order_u, order_v = (sorted(range(len(chosen)), key=margins.tolist().__getitem__) for margins in (u, v))
        partner = dict(zip(order_u, order_v, strict=True))
        won = u - v[[partner[p] for p in range(len(chosen))]]
    return PAPERS[loss_type](torch, won, lost, beta, eps)


def test_every_type_is_tested_here_or_in_test_dpo():
    assert set(LOSS_TYPES) == {*PAPERS, "sigmoid", "hinge", "ipo", "ipo_mean", "robust", "simpo"}


@pytest.mark.parametrize(("loss_type", "eps"), TYPES)
def test_every_backend_computes_the_same_bits(backend, device, loss_type, eps):
    policy, ref, chosen, rejected = make(6, 9, device=device)
    options = {"loss_type": loss_type, "label_smoothing": eps}
    got = rk.dpo_loss(policy, ref, chosen, rejected, **options, backend=backend)
    want = rk.dpo_loss(policy, ref, chosen, rejected, **options, backend="reference")
    assert torch.equal(got.losses, want.losses) and torch.equal(got.rewards, want.rewards)


SIZES = [(1, 0), (2, 1), (5, 7), (100, 1000)]  # responses and pairs: none ... many per response


@pytest.mark.parametrize(("case", "sizes", "dtype"), every_pair(CASES, SIZES, DTYPES))
def test_values_and_gradients(device, case, sizes, dtype):
    (loss_type, beta, eps), (size, pairs) = case, sizes
    policy, ref, chosen, rejected = make(size, pairs, dtype=dtype, device=device)
    upstream = T.randn(pairs, seed=4, device=device)
    leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
    got = rk.dpo_loss(
        *leaves, chosen, rejected, beta, loss_type=loss_type, label_smoothing=eps,
    )  # fmt: skip
    truth = paper_losses(loss_type, *exact, chosen, rejected, beta, eps)
    assert got.losses.dtype == got.rewards.dtype == torch.float32 and got.losses.shape == (pairs,)
    torch.testing.assert_close(got.losses.double(), truth, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.rewards.double(), beta * (policy.double() - ref.double()), rtol=1e-6, atol=1e-6)
    assert not got.rewards.requires_grad
    if pairs:
        grads, wants = T.gradients([got.losses], [upstream], leaves), T.gradients([truth], [upstream], exact)
        for grad, want in zip(grads, wants, strict=True):
            assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)


LOG3 = math.log(3)


@pytest.mark.parametrize(
    ("loss_type", "eps", "loss", "by_chosen", "by_rejected"),
    [  # sigma(w) = 3/4, sigma(l) = 1/4, sigma(h) = 9/10
        ("apo_zero", 0.0, 1 / 4 + 1 / 4, -3 / 16, 3 / 16),
        ("apo_down", 0.0, 3 / 4 + 1 / 10, 3 / 16 - 9 / 100, 9 / 100),
        ("sppo", 0.0, 2 * (LOG3 - 0.5) ** 2, 2 * (LOG3 - 0.5), -2 * (LOG3 - 0.5)),
        ("nca", 0.0, -1.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4), -1 / 4 + 3 / 8, 1 / 8),
        ("exo", 0.1, 0.0, 0.0, 0.0),  # the policy already has the shares (1 - eps, eps)
        ("aot", 0.0, -math.log(0.9), -0.1, 0.1),  # one pair has nothing to be sorted: sigmoid
        ("discopop", 0.0, 1 / 9, -1 / 9, 1 / 9),  # sigma(h / tau) is 1 - 9^-20: the exponential loss
    ],
)
def test_by_hand(device, loss_type, eps, loss, by_chosen, by_rejected):
    policy = torch.tensor([LOG3 - 4, -LOG3 - 5], device=device, requires_grad=True)
    ref, pair = torch.tensor([-4.0, -5.0], device=device), [torch.tensor([i], device=device) for i in (0, 1)]
    losses, _ = rk.dpo_loss(policy, ref, *pair, 1.0, loss_type=loss_type, label_smoothing=eps)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    got = [losses.item(), *grad.tolist()]
    assert got == pytest.approx([loss, by_chosen, by_rejected], rel=1e-6, abs=1e-6)


EXTREMES = [0.0, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4]  # e^x overflows fp32 past 88; sigma(17) rounds to 1 there


@pytest.mark.parametrize("lost", EXTREMES)
@pytest.mark.parametrize("won", EXTREMES)
@pytest.mark.parametrize(("loss_type", "eps"), TYPES)
def test_extreme_log_ratios(device, loss_type, eps, won, lost):
    leaf = torch.tensor([won, lost], device=device, requires_grad=True)
    pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
    losses, _ = rk.dpo_loss(leaf, torch.zeros(2, device=device), *pair, 1.0, loss_type=loss_type, label_smoothing=eps)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    with mpmath.workdps(100):  # sigma is 1 - 1e-44 at 100; at 1e4 what is lost is 0 in fp32 anyway

        def paper(w, rejected):
            return PAPERS[loss_type](mpmath, w - rejected if loss_type == "aot" else w, rejected, 1, eps)

        point = mpmath.mpf(won), mpmath.mpf(lost)
        want = [float(mpmath.diff(paper, point, n)) for n in ((0, 0), (1, 0), (0, 1))]
    assert losses.item() == pytest.approx(want[0], rel=1e-5, abs=1e-37)
    assert grad.tolist() == pytest.approx(want[1:], rel=1e-4, abs=1e-37)


def test_aot_pairs_margins_of_equal_rank(device):
    """u = (3, 1, 2) and v = (5, 0, -4): the largest u meets the largest v, and losses stay with the policy's pair."""
    policy = torch.tensor([3.0, 1.0, 2.0, 0.0], device=device, requires_grad=True)
    ref = torch.tensor([5.0, 0.0, -4.0, 0.0], device=device, requires_grad=True)
    chosen, rejected = torch.arange(3, device=device), torch.full((3,), 3, device=device)
    losses, _ = rk.dpo_loss(policy, ref, chosen, rejected, 1.0, loss_type="aot")
    h = torch.tensor([3.0 - 5.0, 1.0 + 4.0, 2.0 - 0.0], device=device)
    torch.testing.assert_close(losses, torch.nn.functional.softplus(-h))
    by_policy, by_ref = torch.autograd.grad(losses @ torch.tensor([1.0, 10.0, 100.0], device=device), (policy, ref))
    slopes = -torch.sigmoid(-h) * torch.tensor([1.0, 10.0, 100.0], device=device)
    torch.testing.assert_close(by_policy, torch.cat([slopes, -slopes.sum()[None]]))
    torch.testing.assert_close(by_ref, torch.cat([-slopes[[0, 2, 1]], slopes.sum()[None]]))


def test_aot_takes_the_pairs_in_any_order(device):
    policy, ref, chosen, rejected = make(20, 50, device=device)
    options = {"loss_type": "aot"}
    losses, _ = rk.dpo_loss(policy, ref, chosen, rejected, **options)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled, _ = rk.dpo_loss(policy, ref, chosen[order], rejected[order], **options)
    torch.testing.assert_close(shuffled.sort().values, losses.sort().values)
    margins = policy[chosen] - policy[rejected]
    alone = (margins[:, None] == margins).sum(1) == 1  # tied pairs may exchange their partners
    assert alone.sum() > 20
    torch.testing.assert_close(shuffled[alone[order]], losses[order][alone[order]])
    halves = [rk.dpo_loss(policy, ref, chosen[s], rejected[s], **options).losses for s in (slice(25), slice(25, 50))]
    assert (torch.cat(halves) - losses).abs().max() > 0.01  # it couples the pairs of a call
    of_a_pair, _ = rk.dpo_loss(policy, ref, chosen, rejected)
    assert (of_a_pair - losses).abs().max() > 0.01


def test_a_tie_goes_by_position(device):
    policy, ref = torch.tensor([1.0, 1.0, 0.0], device=device), torch.tensor([2.0, -2.0, 0.0], device=device)
    pairs = torch.tensor([0, 1], device=device), torch.tensor([2, 2], device=device)
    losses, _ = rk.dpo_loss(policy, ref, *pairs, 1.0, loss_type="aot")
    torch.testing.assert_close(losses, torch.nn.functional.softplus(torch.tensor([-3.0, 1.0], device=device)))


@pytest.mark.parametrize(
    ("loss_type", "eps", "constant"),
    [
        ("apo_zero", 0.0, 1.0),
        ("apo_down", 0.0, 1.0),
        ("nca", 0.0, 2 * math.log(2)),
        ("exo", 0.1, -0.5 * math.log(4 * 0.1 * 0.9)),
        ("aot", 0.1, math.log(2)),
        ("discopop", 0.0, 0.5 * math.log(2) + 0.5),
    ],
)
def test_beta_0_is_a_constant_without_gradient(device, loss_type, eps, constant):
    policy, ref, chosen, rejected = make(6, 9, device=device)
    policy.requires_grad_()
    losses, rewards = rk.dpo_loss(policy, ref, chosen, rejected, 0.0, loss_type=loss_type, label_smoothing=eps)
    torch.testing.assert_close(losses, torch.full_like(losses, constant))
    assert (rewards == 0).all() and (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


@pytest.mark.parametrize(("loss_type", "eps"), [(t, e) for t, e in TYPES if t != "aot"])
def test_a_bad_response_stays_in_its_pairs(device, loss_type, eps):
    chosen, rejected = torch.tensor([0, 1, 2, 0], device=device), torch.tensor([1, 2, 3, 3], device=device)
    policy, ref = torch.tensor([-1.0, math.nan, -2.0, -3.0], device=device), torch.full((4,), -2.0, device=device)
    losses, _ = rk.dpo_loss(policy, ref, chosen, rejected, loss_type=loss_type, label_smoothing=eps)
    assert losses.isnan().tolist() == [True, True, False, False]
