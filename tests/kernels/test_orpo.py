"""orpo_loss: against the paper's formula, at both ends of the probabilities, by hand, errors."""

import math

import mpmath  # comes with torch: sympy is made of it
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def paper(m, chosen, rejected, beta):
    """Hong et al. (2024), eq. 4, 6 and 7, of mean log-probs: odds(p) = p / (1 - p), L_SFT + beta L_OR. `m` is torch,
    which takes fp64 tensors, or mpmath, which has more digits and no overflow."""
    odds_w, odds_l = (m.exp(mean) / (1 - m.exp(mean)) for mean in (chosen, rejected))
    ratio = odds_w / odds_l
    return -chosen - beta * m.log(ratio / (1 + ratio)), m.log(ratio)  # sigma(log x) = x / (1 + x)


def make(size, pairs, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 30, (size,), generator=generator).to(device)
    means = -0.02 - 3 * torch.rand(size, generator=generator, dtype=torch.float64).to(device)
    chosen, rejected = (torch.randint(max(size, 1), (pairs,), generator=generator).to(device) for _ in range(2))
    return (means * counts).to(dtype), counts, chosen, rejected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("size", "pairs"), [(1, 0), (2, 1), (5, 7), (100, 1000)])  # none ... many per response
def test_values_and_gradients(device, size, pairs, beta, dtype):
    policy, counts, chosen, rejected = make(size, pairs, dtype=dtype, device=device)
    upstream = T.randn(pairs, seed=4, device=device)
    (leaf,), (exact,) = T.leaves_of((policy,)), T.leaves_of((policy,), torch.float64)
    got = rk.orpo_loss(leaf, counts, chosen, rejected, beta)
    means = exact / counts
    truth, log_odds = paper(torch, means[chosen], means[rejected], beta)
    for value, want in (
        (got.losses, truth), (got.nll, -means[chosen]), (got.log_odds, log_odds), (got.rewards, beta * means)
    ):  # fmt: skip
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want, rtol=3e-6, atol=3e-6)
    assert got.losses.requires_grad and not any(t.requires_grad for t in got[1:])
    if pairs:
        (grad,), (want,) = T.gradients([got.losses], [upstream], [leaf]), T.gradients([truth], [upstream], [exact])
        assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)


def test_by_hand(device):
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


def test_beta_0_is_fine_tuning_on_the_chosen_responses(device):
    policy, counts, chosen, rejected = make(6, 9, device=device)
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
        log_odds = float(paper(mpmath, *point, 1)[1])
        want = [float(mpmath.diff(lambda w, r: paper(mpmath, w, r, 1)[0], point, n)) for n in ((0, 0), (1, 0), (0, 1))]
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


def test_gradcheck(device):
    policy, counts, chosen, rejected = make(4, 5, dtype=torch.float64, device=device)
    leaf = policy.requires_grad_()

    def op(policy):
        return rk.orpo_loss(policy, counts, chosen, rejected, 0.5).losses

    assert op(leaf).dtype == torch.float64
    assert torch.autograd.gradcheck(op, leaf) and torch.autograd.gradgradcheck(op, leaf)


def test_compiles_without_graph_breaks(device):
    policy, counts, chosen, rejected = make(4, 5, device=device)
    leaf = policy.requires_grad_()
    compiled = torch.compile(rk.orpo_loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaf, counts, chosen, rejected), rk.orpo_loss(leaf, counts, chosen, rejected)
    torch.testing.assert_close(got.losses, want.losses)
    torch.testing.assert_close(*(torch.autograd.grad(x.losses.sum(), leaf)[0] for x in (got, want)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "policy_logps must be float32.*int64"),
        ({"token_counts": torch.ones(3)}, ValueError, r"token_counts must be \[4\], got \(3,\)"),
        ({"token_counts": torch.ones(4, dtype=torch.bool)}, TypeError, "token_counts must be integers.*bool"),
        ({"chosen_idxs": torch.tensor([0.0, 1.0])}, TypeError, "chosen_idxs must be int64, got torch.float32"),
        ({"rejected_idxs": torch.tensor([3])}, ValueError, r"rejected_idxs must be \[2\] like chosen_idxs"),
        ({"rejected_idxs": torch.tensor([2, 4])}, IndexError, r"rejected_idxs must lie in \[0, 4\), got 4"),
        ({"token_counts": torch.ones(4, device="meta")}, ValueError, "one device.*meta"),
        ({"beta": -0.1}, ValueError, "beta must be finite and >= 0, got -0.1"),
        ({"beta": math.nan}, ValueError, "beta must be finite"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
    ],
)
def test_errors(changes, error, message):
    args = {
        "policy_logps": torch.zeros(4), "token_counts": torch.ones(4),
        "chosen_idxs": torch.tensor([0, 1]), "rejected_idxs": torch.tensor([2, 3]),
    } | changes  # fmt: skip
    with pytest.raises(error, match=message):
        rk.orpo_loss(**args)
