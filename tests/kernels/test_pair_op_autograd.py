"""Autograd of the ops on a number a response or token, which for the compiled ones is written in C++."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from rlhf_kernels import testing as T

S = 12
CHOSEN, REJECTED = torch.arange(S // 2), torch.arange(S // 2, S)


def kl_penalty(first, second, backend):
    return rk.kl_penalty(first, second, "k3", backend=backend)


def dpo_loss(first, second, backend):
    idxs = CHOSEN.to(first.device), REJECTED.to(first.device)
    return rk.dpo_loss(first, second, *idxs, 0.3, label_smoothing=0.1, backend=backend).losses


def bradley_terry_loss(first, second, backend):
    return rk.bradley_terry_loss(first, second, center_coefficient=0.1, backend=backend)


OPS = [kl_penalty, dpo_loss, bradley_terry_loss]


@pytest.fixture(params=OPS, ids=lambda op: op.__name__)
def op(request, backend):
    return lambda first, second: request.param(first, second, backend)


def leaves(device, *needed):
    pair = [T.randn(S, seed=seed, device=device) for seed in (1, 2)]
    return [leaf.requires_grad_(need) for leaf, need in zip(pair, needed, strict=True)]


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_one_side_alone_gets_its_gradient(op, device, needed):
    both = leaves(device, True, True)
    op(*both).square().sum().backward()
    one = leaves(device, *needed)
    op(*one).square().sum().backward()
    for leaf, need, other in zip(one, needed, both, strict=True):
        assert torch.equal(leaf.grad, other.grad) if need else leaf.grad is None


def test_nothing_is_recorded_where_nothing_is_needed(op, device):
    assert not op(*leaves(device, False, False)).requires_grad
    with torch.no_grad():
        assert not op(*leaves(device, True, True)).requires_grad
    with torch.inference_mode():
        assert op(*leaves(device, False, False)).is_inference()


def test_the_rewards_of_dpo_are_no_part_of_the_graph(backend, device):
    first, second = leaves(device, True, True)
    out = rk.dpo_loss(first, second, CHOSEN.to(device), REJECTED.to(device), backend=backend)
    assert out.losses.requires_grad and not out.rewards.requires_grad


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("which", OPS, ids=lambda op: op.__name__)
def test_an_input_that_was_changed_is_noticed(which, native, device, side):
    """It is what backward computes from; the reference keeps differences instead."""
    pair = [leaf * 1 for leaf in leaves(device, True, True)]
    losses = which(*pair, native)
    pair[side].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_backward_twice_needs_the_graph_kept(op, device):
    pair = leaves(device, True, True)
    total = op(*pair).sum()
    total.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in pair]
    total.backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(pair, once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_backward_in_a_graph_of_its_own(op, device):
    """Compiled autograd traces what C++ does in backward."""
    plain, traced = leaves(device, True, True), leaves(device, True, True)
    op(*plain).sum().backward()
    total = op(*traced).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        total.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, traced, strict=True))


def test_under_checkpoint(op, device):
    plain, recomputed = leaves(device, True, True), leaves(device, True, True)
    op(*plain).sum().backward()
    checkpoint(op, *recomputed, use_reentrant=False).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, recomputed, strict=True))
