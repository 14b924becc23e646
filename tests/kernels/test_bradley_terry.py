"""bradley_terry_loss: values and gradients against the formula in fp64, extremes, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"center_coefficient": 0.01},
    {"margin": True},
    {"margin": True, "label_smoothing": 0.3, "center_coefficient": 0.5},
]


PAIRS = [0, 1, 7, 8, 9, 1000]  # none; around a vector; more than a block


def plain(chosen, rejected, margin=None, label_smoothing=0.0, center_coefficient=0.0):
    """Ouyang et al., eq. 1; Llama 2's margin; Eisenstein et al.'s centring. -log sigma(x) = softplus(-x)."""
    d = chosen - rejected - (0 if margin is None else margin)
    softplus = torch.nn.functional.softplus
    likelihood = (1 - label_smoothing) * softplus(-d) + label_smoothing * softplus(d)
    return likelihood + center_coefficient * (chosen + rejected) ** 2


def make(p, dtype, device, options):
    chosen, rejected, margin = (T.randn(p, seed=s, dtype=dtype, device=device) for s in (1, 2, 3))
    return chosen, rejected, {**options, **({"margin": margin.abs()} if "margin" in options else {})}


@pytest.mark.parametrize(("pairs", "dtype", "options"), every_pair(PAIRS, DTYPES, OPTIONS))
def test_values_and_gradients(backend, device, pairs, dtype, options):
    chosen, rejected, options = make(pairs, dtype, device, options)
    upstream = T.randn(pairs, seed=4, device=device)
    leaves, exact = T.leaves_of((chosen, rejected)), T.leaves_of((chosen, rejected), torch.float64)
    got = rk.bradley_terry_loss(*leaves, **options, backend=backend)
    truth = plain(*exact, **{k: v.double() if k == "margin" else v for k, v in options.items()})
    assert got.dtype == torch.float32 and got.shape == (pairs,)
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(got, leaves, upstream)
    wants = torch.autograd.grad(truth, exact, upstream.double())
    for grad, want in zip(grads, wants, strict=True):
        assert grad.dtype == dtype
        assert T.relative_error(grad, want) <= T.gradient_limit(2e-7, dtype)


@pytest.mark.parametrize("size", [20.0, 100.0, 1e4, 1e30])  # e^-20 must survive; e^100 and (1e30)^2 overflow fp32
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_differences_are_finite(backend, device, size, label_smoothing):
    d = torch.tensor([size, -size], device=device, requires_grad=True)
    zero = torch.zeros(2, device=device)
    loss = rk.bradley_terry_loss(d, zero, label_smoothing=label_smoothing, backend=backend)
    truth = plain(d.detach().double(), zero.double(), label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-38)  # subnormals may flush to 0
    (grad,) = torch.autograd.grad(loss.sum(), d)
    want = -(1 - label_smoothing) * torch.sigmoid(-d.double()) + label_smoothing * torch.sigmoid(d.double())
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-38)


def test_known_values(backend, device):
    """Equal rewards: log 2, and the gradient pulls by half. A margin moves the point of indifference."""
    r = torch.tensor([0.3], device=device, requires_grad=True)
    loss = rk.bradley_terry_loss(r, r.detach(), backend=backend)
    assert abs(loss.item() - math.log(2)) < 1e-7
    assert torch.autograd.grad(loss.sum(), r)[0].item() == -0.5
    one = torch.ones(1, device=device)
    assert abs(rk.bradley_terry_loss(one, 0 * one, margin=one, backend=backend).item() - math.log(2)) < 1e-7


def test_the_margin_is_a_constant(backend, device):
    chosen, rejected, margin = (T.randn(5, seed=s, device=device).requires_grad_() for s in (1, 2, 3))
    rk.bradley_terry_loss(chosen, rejected, margin=margin, backend=backend).sum().backward()
    assert margin.grad is None and chosen.grad is not None and rejected.grad is not None


def test_layouts_and_expanded_upstream(backend, device):
    base = T.randn(20, seed=1, device=device).requires_grad_()
    other = T.randn(10, 2, seed=2, device=device)
    got = rk.bradley_terry_loss(base[::2], other[:, 1], backend=backend)
    want = rk.bradley_terry_loss(base[::2].detach().clone(), other[:, 1].clone(), backend=backend)
    assert torch.equal(got, want)
    got.sum().backward()
    assert (base.grad[1::2] == 0).all() and (base.grad[::2] < 0).all()
    one = rk.bradley_terry_loss(
        base.detach()[:1].expand(10), other[:, 0], margin=other[:1, 0].expand(10), backend=backend
    )
    repeated = base.detach()[:1].repeat(10), other[:, 0], other[:1, 0].repeat(10)
    assert torch.equal(one, rk.bradley_terry_loss(*repeated[:2], margin=repeated[2], backend=backend))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_needed(backend, device, needs):
    chosen, rejected = T.randn(9, seed=1, device=device), T.randn(9, seed=2, device=device)
    chosen.requires_grad_(needs[0])
    rejected.requires_grad_(needs[1])
    loss = rk.bradley_terry_loss(chosen, rejected, backend=backend)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.sum().backward()
    assert (chosen.grad is not None, rejected.grad is not None) == needs


def test_mixed_dtypes(backend, device):
    chosen, rejected = T.randn(9, seed=1, device=device), T.randn(9, seed=2, dtype=torch.bfloat16, device=device)
    leaves = T.leaves_of((chosen, rejected))
    margin = torch.full((9,), 0.5, dtype=torch.float16, device=device)
    loss = rk.bradley_terry_loss(*leaves, margin=margin, backend=backend)
    torch.testing.assert_close(loss.double(), plain(chosen.double(), rejected.double(), 0.5), rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    assert leaves[0].grad.dtype == torch.float32 and leaves[1].grad.dtype == torch.bfloat16


def test_one_bad_pair_stays_alone(backend, device):
    chosen, rejected = T.randn(33, seed=1, device=device), T.randn(33, seed=2, device=device)
    want = rk.bradley_terry_loss(chosen, rejected, backend=backend)
    chosen[17] = math.nan
    got = rk.bradley_terry_loss(chosen, rejected, backend=backend)
    others = torch.arange(33, device=device) != 17
    assert got[17].isnan() and torch.equal(got[others], want[others])


def test_float64_in_float64_out(device):
    chosen, rejected, _ = make(9, torch.float64, device, {})
    loss = rk.bradley_terry_loss(chosen, rejected)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, plain(chosen, rejected), rtol=1e-14, atol=1e-14)
