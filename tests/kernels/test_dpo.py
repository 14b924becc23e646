"""dpo_loss: each type against its paper's formula, index pairs, gradients, extremes, errors."""

import itertools
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIX_PAIRS = list(itertools.combinations(range(4), 2))  # four ranked responses: each better one against each worse one


def log_sigmoid(x):
    return -torch.nn.functional.softplus(-x)


# Per pair, from the papers: pi_w, pi_l, ref_w, ref_l are sums of log-probs, n_w, n_l numbers of tokens.
def paper_sigmoid(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    """Rafailov et al. (2023), eq. 7; with eps Mitchell (2023), "A note on DPO with noisy preferences"."""
    h = beta * (pi_w - ref_w) - beta * (pi_l - ref_l)
    return -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)


def paper_hinge(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    """Liu et al. (2024), RSO, eq. 9: max(0, 1 - gamma [log pi/ref(w) - log pi/ref(l)])."""
    return torch.relu(1 - beta * ((pi_w - ref_w) - (pi_l - ref_l)))  # at the kink the gradient is 0


def paper_ipo(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    """Azar et al. (2023), eq. 17: (h(y_w, y_l) - tau^-1 / 2)^2 with h of sums."""
    return ((pi_w + ref_l - pi_l - ref_w) - 0.5 / beta) ** 2


def paper_ipo_mean(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    return paper_ipo(pi_w / n_w, pi_l / n_l, ref_w / n_w, ref_l / n_l, 1, 1, beta, eps, gamma)


def paper_robust(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    """Chowdhury et al. (2024), eq. 12: ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps)."""
    right = paper_sigmoid(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, 0, gamma)
    wrong = paper_sigmoid(pi_l, pi_w, ref_l, ref_w, n_l, n_w, beta, 0, gamma)
    return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)


def paper_simpo(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, eps, gamma):
    """Meng et al. (2024), eq. 6, its gamma being beta times ours: log sigma(beta/n_w pi_w - beta/n_l pi_l - gamma)."""
    h = beta / n_w * pi_w - beta / n_l * pi_l - beta * gamma
    return -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)


PAPERS = {
    "sigmoid": paper_sigmoid, "hinge": paper_hinge, "ipo": paper_ipo, "ipo_mean": paper_ipo_mean,
    "robust": paper_robust, "simpo": paper_simpo,
}  # fmt: skip
CASES = [  # type, beta, label smoothing
    ("sigmoid", 0.1, 0.0),  # the lecture's
    ("sigmoid", 2.0, 0.2),  # cDPO
    ("sigmoid", 0.0, 0.0),  # allowed: log 2 everywhere
    ("hinge", 0.5, 0.0),  # pairs on both sides of the hinge
    ("hinge", 0.0, 0.0),
    ("ipo", 0.1, 0.0),
    ("ipo_mean", 0.3, 0.0),
    ("robust", 0.5, 0.0),  # without noise it is DPO
    ("robust", 0.5, 0.3),
    ("simpo", 2.0, 0.0),
    ("simpo", 2.0, 0.1),
]


def make(size, pairs, loss_type, *, dtype=torch.float32, device="cpu"):
    policy, ref = (T.randn(size, seed=s, dtype=dtype, device=device) * 4 - 20 for s in (1, 2))
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randint(max(size, 1), (pairs,), generator=generator).to(device) for _ in range(2))
    counts = torch.randint(1, 30, (size,), generator=generator).to(device)
    return policy, None if loss_type == "simpo" else ref, chosen, rejected, counts


def paper_losses(loss_type, policy, ref, chosen, rejected, counts, beta, eps, gamma):
    counts = counts.to(policy.dtype)
    ref = torch.zeros_like(policy) if ref is None else ref
    of = [t[i] for t in (policy, ref, counts) for i in (chosen, rejected)]
    return PAPERS[loss_type](*of, beta, eps, gamma)


SIZES = [(1, 0), (2, 1), (5, 7), (16, 8), (100, 1000)]  # responses and pairs: none ... many per response


@pytest.mark.parametrize(("case", "sizes", "dtype"), every_pair(CASES, SIZES, DTYPES))
def test_values_and_gradients(backend, device, case, sizes, dtype):
    (loss_type, beta, eps), (size, pairs) = case, sizes
    policy, ref, chosen, rejected, counts = make(size, pairs, loss_type, dtype=dtype, device=device)
    upstream = T.randn(pairs, seed=4, device=device)
    leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
    got = rk.dpo_loss(
        *leaves, chosen, rejected, beta, loss_type=loss_type, label_smoothing=eps, token_counts=counts, gamma=0.7,
        backend=backend,
    )  # fmt: skip
    truth = paper_losses(loss_type, *exact, chosen, rejected, counts, beta, eps, 0.7)
    assert got.losses.dtype == got.rewards.dtype == torch.float32 and got.losses.shape == (pairs,)
    torch.testing.assert_close(got.losses.double(), truth, rtol=2e-6, atol=2e-6)
    ratios = policy.double() - (0 if ref is None else ref.double())
    per_token = ratios / counts if loss_type in ("ipo_mean", "simpo") else ratios
    torch.testing.assert_close(got.rewards.double(), beta * per_token, rtol=1e-6, atol=1e-6)
    assert not got.rewards.requires_grad
    if pairs and beta:
        grads = T.gradients([got.losses], [upstream], leaves)
        wants = T.gradients([truth], [upstream], exact)
        for leaf, grad, want in zip(leaves, grads, wants, strict=True):
            if leaf is not None:
                assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)


def test_four_responses_make_six_pairs(backend, device):
    """Each response is computed once and serves in three pairs; its gradient is the sum over them."""
    chosen, rejected = (torch.tensor(side, device=device) for side in zip(*SIX_PAIRS, strict=True))
    policy, ref = T.randn(4, seed=1, device=device).requires_grad_(), T.randn(4, seed=2, device=device)
    losses, rewards = rk.dpo_loss(policy, ref, chosen, rejected, 0.1, backend=backend)
    assert losses.shape == (6,) and rewards.shape == (4,)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    mu = 0.1 * ((policy - ref)[chosen] - (policy - ref)[rejected]).detach().double()
    want = torch.zeros(4, dtype=torch.float64, device=device)
    for pair, (better, worse) in enumerate(SIX_PAIRS):  # -beta sigma(-mu) (grad log pi(chosen) - grad log pi(rejected))
        slope = -0.1 * torch.sigmoid(-mu[pair])
        want[better] += slope
        want[worse] -= slope
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-8)
    assert abs(grad.sum()) < 1e-7


def test_the_gradient_of_one_pair_is_the_analytic_one(backend, device):
    for beta in (0.1, 1.0):
        policy = torch.tensor([-3.0, -5.0], device=device, requires_grad=True)
        ref = torch.tensor([-4.0, -4.5], device=device)
        pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
        (grad,) = torch.autograd.grad(rk.dpo_loss(policy, ref, *pair, beta, backend=backend).losses.sum(), policy)
        slope = beta / (1 + math.exp(beta * 1.5))
        torch.testing.assert_close(grad, torch.tensor([-slope, slope], device=device), rtol=1e-6, atol=0)


def test_beta_0_is_log_2_with_zero_gradient(backend, device):
    policy, ref, chosen, rejected, _ = make(6, 9, "sigmoid", device=device)
    policy.requires_grad_()
    losses, rewards = rk.dpo_loss(policy, ref, chosen, rejected, 0.0, backend=backend)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert (rewards == 0).all() and (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


def test_a_response_against_itself_has_no_gradient(backend, device):
    policy = torch.tensor([-2.0, -1.0], device=device, requires_grad=True)
    same = torch.tensor([1], device=device)
    losses, _ = rk.dpo_loss(policy, torch.zeros(2, device=device), same, same, backend=backend)
    assert abs(losses.item() - math.log(2)) < 1e-7
    assert (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


@pytest.mark.parametrize("h", [1e4, -1e4, 30.0, -30.0, 100.0, -100.0])  # e^h overflows fp32 past 88
@pytest.mark.parametrize(("loss_type", "eps"), [(t, e) for t, b, e in CASES if b])
def test_extreme_log_ratios_are_finite(backend, device, loss_type, eps, h):
    policy = torch.tensor([h, 0.0], device=device)
    ref = None if loss_type == "simpo" else torch.zeros(2, device=device)
    counts = torch.ones(2, dtype=torch.int64, device=device)
    pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
    leaf, exact = policy.requires_grad_(), policy.detach().double().requires_grad_()
    got = rk.dpo_loss(
        leaf, ref, *pair, 1.0, loss_type=loss_type, label_smoothing=eps, token_counts=counts, backend=backend
    ).losses
    truth = paper_losses(loss_type, exact, None, *pair, counts, 1.0, eps, 0.5)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-38)
    (grad,), (want,) = (torch.autograd.grad(x.sum(), y) for x, y in ((got, leaf), (truth, exact)))
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-37)


def test_rewards_are_detached_and_in_nats(backend, device):
    policy, ref, chosen, rejected, _ = make(6, 3, "sigmoid", device=device)
    policy.requires_grad_()
    _, rewards = rk.dpo_loss(policy, ref, chosen, rejected, 0.3, backend=backend)
    assert not rewards.requires_grad
    torch.testing.assert_close(rewards, 0.3 * (policy - ref).detach())


def test_the_reference_gets_the_opposite_gradient_when_it_asks(backend, device):
    policy, ref, chosen, rejected, _ = make(6, 9, "sigmoid", device=device)
    leaves = T.leaves_of((policy, ref))
    losses, _ = rk.dpo_loss(*leaves, chosen, rejected, backend=backend)
    grad_policy, grad_ref = torch.autograd.grad(losses.sum(), leaves)
    assert torch.equal(grad_policy, -grad_ref)


def test_layouts_and_expanded_upstream(backend, device):
    policy, ref, chosen, rejected, _ = make(12, 20, "sigmoid", device=device)
    want = rk.dpo_loss(policy[::2].clone(), ref[::2].clone(), chosen % 6, rejected % 6, backend=backend)
    leaf = policy.requires_grad_()
    spread = (chosen % 6).repeat_interleave(2)[::2], torch.stack([rejected % 6, rejected], 1)[:, 0]
    got = rk.dpo_loss(leaf[::2], ref[::2], *spread, backend=backend)
    assert torch.equal(got.losses, want.losses) and torch.equal(got.rewards, want.rewards)
    summed, weighed = (
        torch.autograd.grad(reduced, leaf, retain_graph=True)[0]
        for reduced in (got.losses.sum(), got.losses @ torch.ones(20, device=device))
    )
    torch.testing.assert_close(summed, weighed)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    expanded = rk.dpo_loss(leaf[:1].expand(4), ref[:1].expand(4), one.expand(5), (one + 3).expand(5), backend=backend)
    torch.testing.assert_close(expanded.losses, torch.full((5,), math.log(2), device=device))


def test_mixed_dtypes(backend, device):
    policy, ref, chosen, rejected, _ = make(6, 9, "sigmoid", device=device)
    leaves = T.leaves_of((policy, ref.bfloat16()))
    losses, rewards = rk.dpo_loss(*leaves, chosen, rejected, backend=backend)
    truth = paper_losses("sigmoid", policy.double(), ref.bfloat16().double(), chosen, rejected, policy + 1, 0.1, 0, 0)
    assert losses.dtype == rewards.dtype == torch.float32
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    assert leaves[0].grad.dtype == torch.float32 and leaves[1].grad.dtype == torch.bfloat16


def test_the_same_gradient_twice_has_the_same_bits(backend, device):
    """Many pairs add into one response: in a fixed order."""
    policy, ref, chosen, rejected, _ = make(3, 5000, "sigmoid", device=device)
    leaf = policy.requires_grad_()
    grads = [
        torch.autograd.grad(rk.dpo_loss(leaf, ref, chosen, rejected, backend=backend).losses.sum(), leaf)[0]
        for _ in range(3)
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_a_bad_response_stays_in_its_pairs(backend, device):
    chosen, rejected = (torch.tensor(side, device=device) for side in zip(*SIX_PAIRS, strict=True))
    policy, ref = T.randn(4, seed=1, device=device), T.randn(4, seed=2, device=device)
    policy[2] = math.nan
    losses, rewards = rk.dpo_loss(policy, ref, chosen, rejected, backend=backend)
    assert losses.isnan().tolist() == [2 in pair for pair in SIX_PAIRS]
    assert rewards.isnan().tolist() == [False, False, True, False]


def test_an_empty_response_does_not_divide_by_zero(backend, device):
    counts = torch.tensor([3, 0], device=device)
    pair = torch.tensor([0], device=device), torch.tensor([1], device=device)
    policy = torch.tensor([-3.0, 0.0], device=device)
    losses, _ = rk.dpo_loss(policy, None, *pair, 1.0, loss_type="simpo", token_counts=counts, backend=backend)
    assert losses.isfinite().all()
