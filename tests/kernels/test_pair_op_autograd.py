"""Autograd of the ops on a number a response or token, which for the compiled ones is written in C++."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels.dpo.reference import LOSS_TYPES
from rlhf_kernels.kl.reference import ESTIMATORS

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


KINDS = {
    **{f"kl_penalty {name}": lambda x, y, b, name=name: rk.kl_penalty(x, y, name, backend=b) for name in ESTIMATORS},
    **{
        f"dpo_loss {name}": lambda x, y, b, name=name: (
            rk.dpo_loss(x, y, CHOSEN.to(x.device), REJECTED.to(x.device), 0.3, loss_type=name, backend=b).losses
        )
        for name, kind in LOSS_TYPES.items()
        if kind.kernel is not None
    },
    "smoothed dpo_loss": dpo_loss,
    "bradley_terry_loss": lambda x, y, b: rk.bradley_terry_loss(x, y, label_smoothing=0.1, backend=b),
    "bradley_terry_loss with margin": lambda x, y, b: rk.bradley_terry_loss(x, y, margin=y.detach(), backend=b),
    "centred bradley_terry_loss of itself": lambda x, y, b: bradley_terry_loss(x * y, x * y, b),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def close(values, expected, dtype=torch.float32):
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    return all(
        (a.double() - b).abs().max() <= bound * (1 + b.abs().max()) for a, b in zip(values, expected, strict=True)
    )


def penalized(op, pair, backend):
    """A loss with a penalty on its gradients -> its gradients by `autograd.grad`, and by `backward`."""
    losses = op(*pair, backend)
    first = torch.autograd.grad(losses.square().sum(), pair, create_graph=True)
    value = losses.sum() + sum(grad.double().square().sum() for grad in first)
    gradients = torch.autograd.grad(value, pair, retain_graph=True)
    value.backward()
    return [*gradients, *(leaf.grad for leaf in pair)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_penalty_on_the_gradient(kind, dtype, backend, device):
    pair = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves(device, True, True)]
    truth = penalized(kind, [leaf.detach().double().requires_grad_() for leaf in pair], "reference")
    assert any(grad.any() for grad in truth)
    assert close(penalized(kind, pair, backend), truth, dtype)


@pytest.mark.parametrize("side", [0, 1])
def test_the_hessian(kind, side, backend, device):
    def hessian(pair, backend):
        def value(leaf):
            return kind(*(leaf if i == side else other for i, other in enumerate(pair)), backend).sum()

        return [
            torch.autograd.functional.hessian(value, pair[side], vectorize=vectorize) for vectorize in (False, True)
        ]

    pair = [leaf.detach() for leaf in leaves(device, True, True)]
    assert close(hessian(pair, backend), hessian([leaf.double() for leaf in pair], "reference"))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_second_derivatives_of_one_side(op, device, needed):
    pair = leaves(device, *needed)
    (leaf,) = [leaf for leaf in pair if leaf.requires_grad]
    (first,) = torch.autograd.grad(op(*pair).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert second.any()


def test_auto_has_second_derivatives(kind):
    pair = leaves("cpu", True, True)
    truth = penalized(kind, [leaf.detach().double().requires_grad_() for leaf in pair], "reference")
    assert close(penalized(kind, pair, "auto"), truth)
