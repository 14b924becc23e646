"""value_loss: against its formula, where it has no gradient, masks, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(values, old, returns, mask, clip):
    """Token by token, in fp64."""
    rows = []
    for row in zip(values.double(), old.double(), returns.double(), mask.tolist(), strict=True):
        tokens = []
        for v, before, goal, counts in zip(*row, strict=True):
            error = (v - goal) ** 2
            if clip is not None:
                clipped = (before + (v - before).clamp(-clip, clip) - goal) ** 2
                error = clipped if clipped > error else error
            tokens.append(error / 2 if counts else v.new_zeros(()))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def make(b, t, *, dtype=torch.float32, device="cpu"):
    old = T.randn(b, t, seed=1, dtype=torch.float64)
    values = old + 0.5 * T.randn(b, t, seed=2, dtype=torch.float64)
    returns = old + T.randn(b, t, seed=3, dtype=torch.float64)
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(4)) < 0.67
    return *(x.to(device, dtype) for x in (values, old, returns)), mask.to(device)


@pytest.mark.parametrize(
    ("shape", "clip", "dtype"), every_pair([(1, 1), (5, 64)], [0.2, 0.0, 1.0, math.inf, None], DTYPES)
)
def test_values_and_gradients(device, shape, clip, dtype):
    b, t = shape
    values, old, returns, mask = make(b, t, dtype=dtype, device=device)
    upstream = T.randn(b, t, seed=5, device=device)
    (leaf,), (exact,) = T.leaves_of((values,)), T.leaves_of((values,), torch.float64)
    got, truth = rk.value_loss(leaf, old, returns, mask, clip=clip), plain(exact, old, returns, mask, clip)
    assert got.dtype == torch.float32 and got.shape == (b, t)
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-6)
    (grad,), (want,) = T.gradients([got], [upstream], [leaf]), T.gradients([truth], [upstream], [exact])
    assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)
    assert (got[~mask] == 0).all() and (grad[~mask] == 0).all()


def test_by_hand(device):
    """Old value 0, clip 1: inside; at the bound; past it towards the return, where nothing is left to gain; past it
    away from the return; across the return, where the clipped error is the smaller one."""
    values = torch.tensor([[0.5, 1.0, 2.0, -2.0, 3.0]], device=device, requires_grad=True)
    returns = torch.tensor([[3.0, 3.0, 3.0, 3.0, 1.5]], device=device)
    loss = rk.value_loss(values, torch.zeros_like(returns), returns, returns > 0, clip=1.0)
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert loss[0].tolist() == pytest.approx([3.125, 2.0, 2.0, 12.5, 1.125])
    assert grad[0].tolist() == [-2.5, -2.0, 0.0, -5.0, 1.5]


def test_inside_the_bounds_the_gradient_is_not_halved(device):
    """Both errors are equal there; a maximum would share the gradient out, which is right only if both halves come."""
    values, _, returns, mask = make(4, 9, device=device)
    values.requires_grad_()
    loss = rk.value_loss(values, values, returns, mask)
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert torch.equal(grad, torch.where(mask, (values - returns).detach(), 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])  # 1e30 squared is infinite in fp32
@pytest.mark.parametrize("clip", [0.2, None])
def test_what_stands_where_masked_does_not_leak(device, clip, bad):
    values, old, returns, mask = make(4, 9, device=device)
    mask[1] = False
    want = rk.value_loss(values, old, returns, mask, clip=clip)
    for which in range(3):
        tensors = [x.clone() for x in (values, old, returns)]
        tensors[which][~mask] = bad
        leaf = tensors[0].requires_grad_()
        got = rk.value_loss(leaf, *tensors[1:], mask, clip=clip)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert torch.equal(got, want) and (grad[~mask] == 0).all() and grad.isfinite().all()


def test_a_bad_token_stays_alone(device):
    values, old, returns, mask = make(4, 9, device=device)
    mask[2, 3], values[2, 3] = True, math.nan
    assert rk.value_loss(values, old, returns, mask).isnan().nonzero().tolist() == [[2, 3]]


def test_only_the_values_have_a_gradient_and_none_reads_the_old_ones(device):
    values, old, returns, mask = make(4, 9, device=device)
    leaves = T.leaves_of((values, old, returns))
    rk.value_loss(*leaves, mask).sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None
    assert rk.value_loss(values, old * math.nan, returns, mask, clip=None).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_at_all(device, shape):
    leaf, mask = torch.zeros(shape, device=device, requires_grad=True), torch.zeros(shape, dtype=torch.bool)
    assert rk.value_loss(leaf, leaf, leaf, mask.to(device)).shape == shape


def test_layouts(device):
    tensors = make(12, 10, device=device)
    want = rk.value_loss(*(x[::2, 1::3].contiguous() for x in tensors))
    assert torch.equal(rk.value_loss(*(x[::2, 1::3] for x in tensors)), want)


def test_float64_in_float64_out(device):
    values, old, returns, mask = make(3, 5, dtype=torch.float64, device=device)
    leaf = values.requires_grad_()
    op = lambda x: rk.value_loss(x, old, returns, mask)  # noqa: E731
    assert op(leaf).dtype == torch.float64
    torch.testing.assert_close(op(leaf), plain(leaf, old, returns, mask, 0.2), rtol=1e-14, atol=1e-14)
