"""bco_loss: against the paper's formula, its bound on DPO's loss, extremes, by hand, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def paper(policy, ref, desirable, shift, beta):
    """Jung et al. (2024), response by response: -log sigma(r - delta) or -log sigma(-(r - delta))."""
    losses = []
    for pi, pi_ref, good in zip(policy, ref, desirable.tolist(), strict=True):
        logit = beta * (pi - pi_ref) - shift
        losses.append(-torch.log(torch.sigmoid(logit if good else -logit)))
    return torch.stack(losses) if losses else policy.new_zeros(0)


def make(size, *, dtype=torch.float32, device="cpu"):
    """Log-probs in steps of 1/64 nat, whose differences are exact in fp32."""
    policy, ref = ((T.randn(size, seed=s, dtype=torch.float64) * 4 - 20).mul(64).round() / 64 for s in (1, 2))
    desirable = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.4
    return policy.to(device, dtype), ref.to(device, dtype), desirable.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta", "shift"), [(0.1, 0.0), (1.0, 0.5), (0.5, -2.0)])
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_values_and_gradients(device, size, beta, shift, dtype):
    policy, ref, desirable = make(size, dtype=dtype, device=device)
    upstream, delta = T.randn(size, seed=4, device=device), torch.tensor(shift, device=device)
    leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
    got = rk.bco_loss(*leaves, desirable, delta, beta)
    truth = paper(*exact, desirable, shift, beta)
    assert got.losses.dtype == got.rewards.dtype == torch.float32 and got.losses.shape == (size,)
    torch.testing.assert_close(got.losses.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.rewards.double(), beta * (policy.double() - ref.double()), rtol=1e-6, atol=1e-6)
    assert not got.rewards.requires_grad
    if size:
        grads, wants = T.gradients([got.losses], [upstream], leaves), T.gradients([truth], [upstream], exact)
        for grad, want in zip(grads, wants, strict=True):
            assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)


def test_by_hand(device):
    """r - delta = log 3 and -log 3: sigma is 3/4 and 1/4. beta multiplies the log-ratio, not the shift."""
    log3 = math.log(3)
    policy = torch.tensor([4 * log3 - 4, -4.0, 4 * log3 - 4, -4.0], device=device, requires_grad=True)
    ref, shift = torch.full((4,), -4.0, device=device), torch.tensor(log3, device=device)
    desirable = torch.tensor([True, True, False, False], device=device)
    losses, rewards = rk.bco_loss(policy, ref, desirable, shift, 0.5)
    assert losses.tolist() == pytest.approx([-math.log(x / 4) for x in (3, 1, 1, 3)], rel=1e-6)
    assert rewards.tolist() == pytest.approx([2 * log3, 0.0, 2 * log3, 0.0], rel=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert grad.tolist() == pytest.approx([-0.5 / 4, -0.5 * 3 / 4, 0.5 * 3 / 4, 0.5 / 4], rel=1e-6)


def test_the_shift_gets_no_gradient(device):
    policy, ref, desirable = make(7, device=device)
    shift = torch.tensor(0.5, device=device, requires_grad=True)
    rk.bco_loss(policy.requires_grad_(), ref, desirable, shift).losses.sum().backward()
    assert shift.grad is None and (policy.grad != 0).all()


def test_a_pair_sums_to_at_least_the_dpo_loss(device):
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


@pytest.mark.parametrize("ratio", [1e4, -1e4, 30.0, -30.0, 80.0, -80.0])
@pytest.mark.parametrize("good", [True, False])
def test_extreme_log_ratios(device, good, ratio):
    leaf = torch.tensor([ratio], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    losses, _ = rk.bco_loss(leaf, zero, torch.tensor([good], device=device), zero[0], 1.0)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    side = -1 if good else 1
    right, small = side * ratio < 0, math.exp(-abs(ratio))
    assert losses.item() == pytest.approx(small if right else abs(ratio), rel=1e-5, abs=1e-37)
    assert grad.item() == pytest.approx(side * (small if right else 1.0), rel=1e-5, abs=1e-37)


def test_beta_0_is_a_constant_without_gradient(device):
    policy, ref, desirable = make(7, device=device)
    losses, rewards = rk.bco_loss(policy.requires_grad_(), ref, desirable, policy.new_zeros(()), 0.0)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert (rewards == 0).all() and (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


def test_a_bad_response_stays_alone(device):
    policy, ref, desirable = make(7, device=device)
    policy[2] = math.nan
    losses, rewards = rk.bco_loss(policy, ref, desirable, policy.new_zeros(()))
    assert losses.isnan().nonzero().tolist() == rewards.isnan().nonzero().tolist() == [[2]]


def test_gradcheck(device):
    policy, ref, desirable = make(6, dtype=torch.float64, device=device)
    shift = torch.tensor(0.5, device=device)  # fp32 beside fp64

    def op(policy, ref):
        return rk.bco_loss(policy, ref, desirable, shift, 0.3).losses

    leaves = T.leaves_of((policy, ref))
    assert op(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(op, leaves) and torch.autograd.gradgradcheck(op, leaves)


def test_compiles_without_graph_breaks(device):
    policy, ref, desirable = make(6, device=device)
    leaf, shift = policy.requires_grad_(), torch.tensor(0.5, device=device)
    compiled = torch.compile(rk.bco_loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaf, ref, desirable, shift), rk.bco_loss(leaf, ref, desirable, shift)
    torch.testing.assert_close(got.losses, want.losses)
    torch.testing.assert_close(*(torch.autograd.grad(x.losses.sum(), leaf)[0] for x in (got, want)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "policy_logps must be float32.*int64"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
        ({"desirable": torch.ones(4, dtype=torch.int64)}, TypeError, "desirable must be bool, got torch.int64"),
        ({"desirable": torch.ones(3, dtype=torch.bool)}, ValueError, r"desirable must be \[4\], got \(3,\)"),
        ({"ref_logps": torch.zeros(4, device="meta")}, ValueError, "one device.*meta"),
        ({"reward_shift": 0.0}, TypeError, "reward_shift must be a scalar Tensor, got float"),
        ({"reward_shift": torch.zeros(1)}, ValueError, r"reward_shift must be a scalar Tensor, got shape \(1,\)"),
        ({"beta": -0.1}, ValueError, "beta must be finite and >= 0, got -0.1"),
        ({"beta": math.nan}, ValueError, "beta must be finite"),
    ],
)
def test_errors(changes, error, message):
    args = {
        "policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), "desirable": torch.ones(4, dtype=torch.bool),
        "reward_shift": torch.tensor(0.0),
    } | changes  # fmt: skip
    with pytest.raises(error, match=message):
        rk.bco_loss(**args)
