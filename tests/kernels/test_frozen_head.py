"""A head that needs no gradient: forward finds d logprob / d hidden too, and backward multiplies by it."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _extension, _workspace
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

WITHOUT = ("reference",)  # tests/kernels/conftest.py
OPTIONS = {"plain": {}, "affine": {"logit_scale": 0.5, "temperature": 0.7}, "soft cap": {"logit_softcap": 3.0}}
SHAPES = [  # N, D, V
    (1, 1, 1),
    (130, 40, 1500),  # three blocks of rows, the last one padded; several tiles, the last one short
    (70, 72, 9001),  # several groups of the vocabulary, an odd last one
    (3, 640, 5001),  # few rows: many splits at a time
]
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def gradient_of(head, weights, frozen, backend, outputs=(), **options):
    """(results, gradient of the hidden states)"""
    hidden, weight, bias = (None if t is None else t.detach().clone() for t in (head.hidden, head.weight, head.bias))
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    out = rk.linear_logprobs(hidden, weight, head.targets, bias, outputs=outputs, backend=backend, **options)
    (gradient,) = torch.autograd.grad((out.logprobs * weights).sum(), [hidden])
    return out, gradient


def truth_of(head, weights, gemm, **options):
    """The gradient in fp64, of the operands as the GEMM rounds them."""
    rounded = head._replace(**{name: getattr(head, name).to(gemm).double() for name in ("hidden", "weight")})
    rounded = rounded._replace(bias=None if head.bias is None else head.bias.double())
    return gradient_of(rounded, weights.double(), True, "reference", **options)[1]


@pytest.mark.parametrize(("dtype", "shape", "options"), every_pair(list(BOUNDS), SHAPES, OPTIONS))
def test_values_are_those_of_any_head_and_the_gradient_is_exact(backend, device, dtype, shape, options):
    options = OPTIONS[options]
    head = T.make_head(*shape, dtype=dtype, masked=0.3, bias="temperature" in options, device=device)
    weights = T.randn(shape[0], device=device)
    frozen, gradient = gradient_of(head, weights, True, backend, outputs=T.OUTPUTS, **options)
    trained, _ = gradient_of(head, weights, False, backend, outputs=T.OUTPUTS, **options)
    assert all(torch.equal(a, b) for a, b in zip(frozen, trained, strict=True))
    assert gradient.dtype == dtype
    assert T.relative_error(gradient, truth_of(head, weights, dtype, **options)) < BOUNDS[dtype]
    assert gradient[head.targets == -100].count_nonzero() == 0


def test_near_certainty_the_gradient_keeps_its_digits(backend, device):
    """1 - p_y is the sum of the others' probabilities, and not what rounding leaves of 1 - 1."""
    hidden = torch.eye(2, 8, device=device).requires_grad_()
    weight = T.randn(300, 8, device=device) * 0.1
    weight[7, 0], weight[7, 1] = 20.0, 27.0
    targets = torch.full((2,), 7, device=device)
    logprobs = rk.linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    (gradient,) = torch.autograd.grad(logprobs.sum(), [hidden])
    exact = hidden.detach().double().requires_grad_()
    z = exact @ weight.double().T
    others = z[:, torch.arange(300, device=device) != 7]
    truth = -torch.log1p((others - z[:, 7:8]).exp().sum(-1))
    (expected,) = torch.autograd.grad(truth.sum(), [exact])
    assert (truth.abs() < 1e-6).all()
    for row in range(2):
        assert T.relative_error(gradient[row], expected[row]) < 1e-6


@pytest.mark.parametrize("output", ["logsumexp", "entropy"])
def test_gradients_of_other_outputs_take_the_way_of_any_head(backend, device, output):
    head = T.make_head(40, 24, 700, masked=0.3, device=device)
    gradients = []
    for frozen in (True, False):
        hidden = head.hidden.clone().requires_grad_()
        weight = head.weight.clone().requires_grad_(not frozen)
        out = rk.linear_logprobs(hidden, weight, head.targets, outputs=("entropy",), backend=backend)
        gradients += torch.autograd.grad((getattr(out, output) + out.logprobs).sum(), [hidden])
    assert T.relative_error(*gradients) < 3e-6


def test_rows_that_do_not_count_pass_nothing_on(backend, device):
    head = T.make_head(6, 8, 50, device=device)
    hidden = head.hidden.clone()
    hidden[0], hidden[1] = math.nan, math.inf
    hidden.requires_grad_()
    targets = head.targets.clone()
    targets[:3] = -100
    out = rk.linear_logprobs(hidden, head.weight, targets, backend=backend)
    upstream = torch.ones(6, device=device)
    upstream[:3] = torch.tensor([math.nan, math.inf, 1.0])
    (gradient,) = torch.autograd.grad(out.logprobs, [hidden], upstream)
    assert gradient[:3].count_nonzero() == 0
    assert gradient[3:].isfinite().all()


@pytest.mark.parametrize("n", [0, 5])
def test_no_row_counts(backend, device, n):
    head = T.make_head(n, 8, 50, device=device)
    hidden = head.hidden.clone().requires_grad_()
    out = rk.linear_logprobs(hidden, head.weight, torch.full_like(head.targets, -100), backend=backend)
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), [hidden])
    assert gradient.shape == (n, 8)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("mib", [8, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_the_budget_log_probs_are_those_of_any_head(backend, device, dtype, mib):
    """In 8 MiB several chunks of rows, and parts of a group of the head."""
    head = T.make_head(200, 2048, 5000, dtype=dtype, device=device)
    weights = T.randn(200, device=device)
    rk.set_workspace_budget(mib)
    try:
        frozen, gradient = gradient_of(head, weights, True, backend)
        trained, _ = gradient_of(head, weights, False, backend)
    finally:
        rk.set_workspace_budget(None)
    assert torch.equal(frozen.logprobs, trained.logprobs)
    assert T.relative_error(gradient, truth_of(head, weights, dtype)) < BOUNDS[dtype]


def test_it_is_differentiable_once(backend, device):
    head = T.make_head(5, 8, 50, device=device)
    hidden = head.hidden.clone().requires_grad_()
    logprobs = rk.linear_logprobs(hidden, head.weight, head.targets, backend=backend).logprobs
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), [hidden])


@pytest.mark.parametrize(("frozen", "products"), [(True, 2), (False, 4)])
def test_a_frozen_head_takes_two_products_and_any_other_four(native, device, monkeypatch, frozen, products):
    """Of sizes that no tile pads, without kept logits: multiply-adds as the GEMMs count them."""
    n, d, v = 128, 64, 4096
    monkeypatch.setattr(_workspace, "logits_to_keep", lambda *_: 0)
    head = T.make_head(n, d, v, device=device)
    count = _extension.module().multiply_adds
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(not frozen)
    before = count()
    rk.linear_logprobs(hidden, weight, head.targets, backend=native).logprobs.sum().backward()
    assert count() - before == products * n * d * v
