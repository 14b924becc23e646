"""kto_loss: against the paper's formula, where sigma is flat, by hand, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def paper(policy, ref, desirable, kl, beta, weight_d, weight_u):
    """Ethayarajh et al. (2024), eq. 8, response by response: lambda_y - v(x, y)."""
    losses = []
    for pi, pi_ref, good in zip(policy, ref, desirable.tolist(), strict=True):
        r = pi - pi_ref
        if good:
            losses.append(weight_d - weight_d * torch.sigmoid(beta * (r - kl)))
        else:
            losses.append(weight_u - weight_u * torch.sigmoid(beta * (kl - r)))
    return torch.stack(losses) if losses else policy.new_zeros(0)


def make(size, *, dtype=torch.float32, device="cpu"):
    """Log-probs in steps of 1/64 nat, whose differences are exact in fp32."""
    policy, ref = ((T.randn(size, seed=s, dtype=torch.float64) * 4 - 20).mul(64).round() / 64 for s in (1, 2))
    desirable = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.4
    return policy.to(device, dtype), ref.to(device, dtype), desirable.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta", "weights"), [(0.1, (1.0, 1.0)), (1.0, (1.0, 1.0)), (0.5, (1.33, 0.25))])
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_values_and_gradients(device, size, beta, weights, dtype):
    policy, ref, desirable = make(size, dtype=dtype, device=device)
    upstream, kl = T.randn(size, seed=4, device=device), torch.tensor(0.75, device=device)
    leaves, exact = T.leaves_of((policy, ref)), T.leaves_of((policy, ref), torch.float64)
    got = rk.kto_loss(*leaves, desirable, kl, beta, *weights)
    truth = paper(*exact, desirable, kl.double(), beta, *weights)
    assert got.losses.dtype == got.rewards.dtype == torch.float32 and got.losses.shape == (size,)
    torch.testing.assert_close(got.losses.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.rewards.double(), beta * (policy.double() - ref.double()), rtol=1e-6, atol=1e-6)
    assert not got.rewards.requires_grad
    if size:
        grads, wants = T.gradients([got.losses], [upstream], leaves), T.gradients([truth], [upstream], exact)
        for grad, want in zip(grads, wants, strict=True):
            assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)


def test_by_hand(device):
    """beta (r - kl) = log 3 and -log 3: sigma is 3/4 and 1/4."""
    log3 = math.log(3)
    policy = torch.tensor([2 * log3 - 4, -4.0, 2 * log3 - 4, -4.0], device=device, requires_grad=True)
    ref, kl = torch.full((4,), -4.0, device=device), torch.tensor(log3, device=device)
    desirable = torch.tensor([True, True, False, False], device=device)
    losses, rewards = rk.kto_loss(policy, ref, desirable, kl, 1.0, 2.0, 3.0)
    assert losses.tolist() == pytest.approx([2 / 4, 2 * 3 / 4, 3 * 3 / 4, 3 / 4], rel=1e-6)
    assert rewards.tolist() == pytest.approx([2 * log3, 0.0, 2 * log3, 0.0], rel=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert grad.tolist() == pytest.approx([-2 * 3 / 16, -2 * 3 / 16, 3 * 3 / 16, 3 * 3 / 16], rel=1e-6)


def test_kl_is_clamped_at_0_and_gets_no_gradient(device):
    policy, ref, desirable = make(7, device=device)
    kl = torch.tensor([-3.0, 0.0, 2.0], device=device, requires_grad=True)
    below, zero, above = (rk.kto_loss(policy.requires_grad_(), ref, desirable, k).losses for k in kl)
    assert torch.equal(below, zero) and not torch.equal(zero, above)
    above.sum().backward()
    assert kl.grad is None and (policy.grad != 0).all()


@pytest.mark.parametrize("ratio", [1e4, -1e4, 30.0, -30.0, 80.0, -80.0])  # sigma(17) rounds to 1 in fp32
@pytest.mark.parametrize("good", [True, False])
def test_extreme_log_ratios(device, good, ratio):
    """The loss of a response on the flat side of sigma still has a slope, e^-|x|, which 1 - sigma(x) in fp32 loses."""
    leaf = torch.tensor([ratio], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    losses, _ = rk.kto_loss(leaf, zero, torch.tensor([good], device=device), zero[0], 1.0)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    side = -1 if good else 1
    assert losses.item() == pytest.approx(math.exp(-abs(ratio)) if side * ratio < 0 else 1.0, rel=1e-5, abs=1e-37)
    assert grad.item() == pytest.approx(side * math.exp(-abs(ratio)), rel=1e-5, abs=1e-37)


def test_beta_0_is_half_the_weight_without_gradient(device):
    policy, ref, desirable = make(7, device=device)
    losses, rewards = rk.kto_loss(policy.requires_grad_(), ref, desirable, policy.new_ones(()), 0.0, 4.0, 2.0)
    assert torch.equal(losses, torch.where(desirable, 2.0, 1.0)) and (rewards == 0).all()
    assert (torch.autograd.grad(losses.sum(), policy)[0] == 0).all()


def test_a_bad_response_stays_alone(device):
    policy, ref, desirable = make(7, device=device)
    policy[2] = math.nan
    losses, rewards = rk.kto_loss(policy, ref, desirable, policy.new_zeros(()))
    assert losses.isnan().nonzero().tolist() == rewards.isnan().nonzero().tolist() == [[2]]


def test_gradcheck(device):
    policy, ref, desirable = make(6, dtype=torch.float64, device=device)
    kl = torch.tensor(0.5, device=device)  # fp32 beside fp64

    def op(policy, ref):
        return rk.kto_loss(policy, ref, desirable, kl, 0.3, 1.5, 0.5).losses

    leaves = T.leaves_of((policy, ref))
    assert op(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(op, leaves) and torch.autograd.gradgradcheck(op, leaves)


def test_compiles_without_graph_breaks(device):
    policy, ref, desirable = make(6, device=device)
    leaf, kl = policy.requires_grad_(), torch.tensor(0.5, device=device)
    compiled = torch.compile(rk.kto_loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaf, ref, desirable, kl), rk.kto_loss(leaf, ref, desirable, kl)
    torch.testing.assert_close(got.losses, want.losses)
    torch.testing.assert_close(*(torch.autograd.grad(x.losses.sum(), leaf)[0] for x in (got, want)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "policy_logps must be float32.*int64"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
        ({"desirable": torch.ones(4)}, TypeError, "desirable must be bool, got torch.float32"),
        ({"desirable": torch.ones(3, dtype=torch.bool)}, ValueError, r"desirable must be \[4\], got \(3,\)"),
        ({"desirable": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "one device.*meta"),
        ({"kl": 0.0}, TypeError, "kl must be a scalar Tensor, got float"),
        ({"kl": torch.zeros(4)}, ValueError, r"kl must be a scalar Tensor, got shape \(4,\)"),
        ({"kl": torch.tensor(0)}, TypeError, "kl must be float32.*int64"),
        ({"beta": -0.1}, ValueError, "beta must be finite and >= 0, got -0.1"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight must be finite and >= 0, got -1.0"),
        ({"undesirable_weight": math.nan}, ValueError, "undesirable_weight must be finite and >= 0, got nan"),
    ],
)
def test_errors(changes, error, message):
    args = {
        "policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), "desirable": torch.ones(4, dtype=torch.bool),
        "kl": torch.tensor(0.0),
    } | changes  # fmt: skip
    with pytest.raises(error, match=message):
        rk.kto_loss(**args)
