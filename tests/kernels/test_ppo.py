"""ppo_loss, clip_fraction: against the paper's formula, closed forms of gradients, extreme ratios, masks, errors."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOG_2 = math.log(2.0)


def paper(logprobs, old, advantages, mask, low, high, dual=None):
    """Schulman et al. (2017), eq. 7, token by token in fp64; Ye et al. (2019): at least dual A where A < 0."""
    rows = []
    for row in zip(logprobs.double(), old.double(), advantages.double(), mask.tolist(), strict=True):
        tokens = []
        for new, before, a, counts in zip(*row, strict=True):
            r = (new - before).exp()
            objective = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
            if dual is not None and a < 0:
                objective = torch.maximum(objective, dual * a)
            tokens.append(-objective if counts else new.new_zeros(()))
        rows.append(torch.stack(tokens) if tokens else logprobs.new_zeros(0, dtype=torch.float64))
    return torch.stack(rows) if rows else logprobs.double()


def make(b, t, *, dtype=torch.float32, device="cpu"):
    """Ratios between e^-1 and e on either side of the bounds, a third of the tokens masked."""
    old = -3 * T.randn(b, t, seed=1, dtype=torch.float64).abs()
    logprobs = old + 0.4 * T.randn(b, t, seed=2, dtype=torch.float64)
    advantages = T.randn(b, t, seed=3, dtype=torch.float64)
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(4)) < 0.67
    return *(x.to(device, dtype) for x in (logprobs, old, advantages)), mask.to(device)


CLIPS = [(0.2, 0.2, None), (0.2, 0.28, None), (0.0, 0.0, None), (0.2, 0.2, 1.5)]


@pytest.mark.parametrize(("shape", "clips", "dtype"), every_pair([(1, 1), (3, 7), (5, 64)], CLIPS, DTYPES))
def test_values_and_gradients(device, shape, clips, dtype):
    b, t = shape
    logprobs, old, advantages, mask = make(b, t, dtype=dtype, device=device)
    upstream = T.randn(b, t, seed=5, device=device)
    (leaf,), (exact,) = T.leaves_of((logprobs,)), T.leaves_of((logprobs,), torch.float64)
    got = rk.ppo_loss(leaf, old, advantages, mask, clip_low=clips[0], clip_high=clips[1], dual_clip=clips[2])
    truth = paper(exact, old, advantages, mask, *clips)
    assert got.dtype == torch.float32 and got.shape == (b, t)
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-6)
    (grad,), (want,) = T.gradients([got], [upstream], [leaf]), T.gradients([truth], [upstream], [exact])
    assert grad.dtype == dtype and T.relative_error(grad, want) <= T.gradient_limit(1e-6, dtype)
    assert (got[~mask] == 0).all() and (grad[~mask] == 0).all()


def test_the_gradient_is_that_of_ratio_times_advantage_or_none(device):
    """Ratio 1/2, 1 and 2 for A > 0, then for A < 0: past its bound in the direction of A, a token has no gradient."""
    x = torch.tensor([[-LOG_2, 0.0, LOG_2, -LOG_2, 0.0, LOG_2]], device=device, requires_grad=True)
    advantages = torch.tensor([[3.0, 3.0, 3.0, -3.0, -3.0, -3.0]], device=device)
    loss = rk.ppo_loss(x, torch.zeros_like(x), advantages, advantages != 0, clip_low=0.1, clip_high=0.3)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss[0].tolist() == pytest.approx([-1.5, -3.0, -3.9, 2.7, 3.0, 6.0], rel=1e-6)
    assert grad[0].tolist() == pytest.approx([-1.5, -3.0, 0.0, 0.0, 3.0, 6.0], rel=1e-6)
    assert grad[0, 2] == grad[0, 3] == 0  # exactly


@pytest.mark.parametrize("clip", [0.2, 0.0])  # 0: at a ratio of 1 both branches and the bound meet
def test_on_policy_the_gradient_is_exactly_the_policy_gradient(device, clip):
    logprobs, _, advantages, mask = make(4, 9, device=device)
    logprobs.requires_grad_()
    loss = rk.ppo_loss(logprobs, logprobs, advantages, mask, clip_low=clip, clip_high=clip)
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)  # old_logprobs, the same tensor, gets none
    assert torch.equal(grad, torch.where(mask, -advantages, 0.0)) and torch.equal(loss.detach(), grad)


def test_dual_clip_bounds_bad_tokens_that_became_likely(device):
    x = torch.tensor([[LOG_2, 2 * LOG_2, 2 * LOG_2]], device=device, requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]], device=device)
    loss = rk.ppo_loss(x, torch.zeros_like(x), advantages, advantages != 0, dual_clip=3.0)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss[0].tolist() == pytest.approx([2.0, 3.0, -1.2], rel=1e-6)
    assert grad[0].tolist() == pytest.approx([2.0, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "gradient"),
    [
        (1e4, 1.0, None, -1.2, 0.0),
        (-1e4, 1.0, None, 0.0, 0.0),
        (-1e4, -1.0, None, 0.8, 0.0),
        (1e4, -1.0, None, math.inf, math.inf),  # the formula's own
        (1e4, -1.0, 3.0, 3.0, 0.0),
        (1e4, 0.0, None, 0.0, 0.0),  # not 0 times infinity
        (-1e4, 0.0, None, 0.0, 0.0),
        (math.inf, 1.0, None, -1.2, 0.0),  # the old policy could not say it
        (-math.inf, 1.0, None, 0.0, 0.0),  # the new one cannot
        (-math.inf, -1.0, None, 0.8, 0.0),
    ],
)
def test_extreme_ratios(device, ratio, advantage, dual, loss, gradient, dtype):
    x = torch.tensor([[ratio, 0.0]], device=device, dtype=dtype, requires_grad=True)
    advantages = torch.tensor([[advantage, 1.0]], device=device, dtype=dtype)
    mask = torch.ones_like(advantages, dtype=torch.bool)
    got = rk.ppo_loss(x, torch.zeros_like(x), advantages, mask, dual_clip=dual)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert got[0].tolist() == pytest.approx([loss, -1.0], rel=1e-6)
    assert grad[0].tolist() == pytest.approx([gradient, -1.0], rel=1e-6)


def test_1_and_infinity_do_not_clip(device):
    logprobs, old, advantages, mask = make(4, 9, device=device)
    got = rk.ppo_loss(logprobs, old, advantages, mask, clip_low=1, clip_high=math.inf)
    torch.testing.assert_close(got, torch.where(mask, -(logprobs - old).exp() * advantages, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
def test_what_stands_where_masked_does_not_leak(device, bad):
    logprobs, old, advantages, mask = make(4, 9, device=device)
    mask[1] = False  # a whole row
    want = rk.ppo_loss(logprobs, old, advantages, mask)
    for which in range(3):
        tensors = [x.clone() for x in (logprobs, old, advantages)]
        tensors[which][~mask] = bad
        leaf = tensors[0].requires_grad_()
        got = rk.ppo_loss(leaf, *tensors[1:], mask)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert torch.equal(got, want) and (grad[~mask] == 0).all() and grad.isfinite().all()


def test_a_bad_token_stays_alone(device):
    logprobs, old, advantages, mask = make(4, 9, device=device)
    mask[2, 3], logprobs[2, 3] = True, math.nan
    got = rk.ppo_loss(logprobs, old, advantages, mask)
    assert got.isnan().nonzero().tolist() == [[2, 3]]


def test_only_the_policy_has_a_gradient(device):
    logprobs, old, advantages, mask = make(4, 9, device=device)
    leaves = T.leaves_of((logprobs, old, advantages))
    rk.ppo_loss(*leaves, mask).sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_at_all(device, shape):
    leaf, mask = torch.zeros(shape, device=device, requires_grad=True), torch.zeros(shape, dtype=torch.bool)
    loss = rk.ppo_loss(leaf, leaf, leaf, mask.to(device))
    assert loss.shape == shape and torch.autograd.grad(loss.sum(), leaf)[0].shape == shape


def test_layouts(device):
    tensors = make(12, 10, device=device)
    want = rk.ppo_loss(*(x[::2, 1::3].contiguous() for x in tensors))
    assert torch.equal(rk.ppo_loss(*(x[::2, 1::3] for x in tensors)), want)
    assert torch.equal(rk.ppo_loss(*(x.T for x in tensors)), rk.ppo_loss(*tensors).T)


def test_float64_in_float64_out(device):
    logprobs, old, advantages, mask = make(3, 5, dtype=torch.float64, device=device)
    leaf = logprobs.requires_grad_()
    op = lambda x: rk.ppo_loss(x, old, advantages, mask, dual_clip=1.5)  # noqa: E731
    assert op(leaf).dtype == torch.float64
    torch.testing.assert_close(op(leaf), paper(leaf, old, advantages, mask, 0.2, 0.2, 1.5), rtol=1e-14, atol=1e-14)


def test_clip_fraction_is_the_share_of_tokens_without_gradient(device):
    logprobs, old, advantages, mask = make(7, 30, device=device)
    low, high = rk.clip_fraction(logprobs, old, advantages, mask, 0.1, 0.3)
    ratio = (logprobs.double() - old.double()).exp()
    down, up = (ratio < 0.9) & (advantages < 0) & mask, (ratio > 1.3) & (advantages > 0) & mask
    assert 0 < down.sum() != up.sum() > 0
    assert low.item() == pytest.approx(down.sum().item() / mask.sum().item(), rel=1e-6)
    assert high.item() == pytest.approx(up.sum().item() / mask.sum().item(), rel=1e-6)
    leaf = logprobs.requires_grad_()
    loss = rk.ppo_loss(leaf, old, advantages, mask, clip_low=0.1, clip_high=0.3)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal((grad == 0) & mask, down | up)


def test_clip_fraction_takes_advantages_of_sequences(device):
    logprobs, old, _, mask = make(5, 5, device=device)  # square: [B] must not be read as [T]
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=device)
    got = rk.clip_fraction(logprobs.requires_grad_(), old, advantages, mask)
    want = rk.clip_fraction(logprobs, old, advantages[:, None].expand(5, 5), mask)
    other = rk.clip_fraction(logprobs, old, advantages.expand(5, 5), mask)
    assert got == want != other and not got.low.requires_grad and got.low.dtype == torch.float32


def test_clip_fraction_of_nothing_is_0(device):
    logprobs, old, advantages, mask = make(3, 5, device=device)
    assert rk.clip_fraction(logprobs * math.nan, old, advantages, mask & False) == (0, 0)
    logprobs[~mask] = math.nan
    assert rk.clip_fraction(logprobs, old, advantages, mask) == rk.clip_fraction(
        logprobs.nan_to_num(), old, advantages, mask
    )
