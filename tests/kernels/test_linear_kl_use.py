"""linear_kl as it is called: layouts, leading shapes, budget, second derivatives, errors."""

import functools

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["columns", "rows", "transposed", "expanded", "weight transposed", "mask expanded"])
def test_layouts(backend, device, name, dtype):
    """The strides models hand over, on both sides."""
    inputs = T.make_kl_inputs(66, 48, 300, dtype=dtype, masked=0.3, device=device)

    def laid_out(t):
        return {
            "columns": lambda: torch.stack([t, t + 1], -1).flatten(1)[:, ::2],
            "rows": lambda: t.repeat_interleave(2, 0)[::2],
            "transposed": lambda: t.T.contiguous().T,
            "expanded": lambda: t[:1].expand(66, 48),
        }.get(name, lambda: t)()

    changed = inputs._replace(hidden=laid_out(inputs.hidden), ref_hidden=laid_out(inputs.ref_hidden))
    if name == "weight transposed":
        weights = {k: getattr(inputs, k).T.contiguous().T for k in ("weight", "ref_weight")}
        changed = inputs._replace(**weights)
    if name == "mask expanded":
        changed = inputs._replace(mask=torch.ones(1, dtype=torch.bool, device=device).expand(66))
    T.check_linear_kl(functools.partial(rk.linear_kl, backend=backend), changed)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0)])
def test_leading_shapes(backend, device, shape):
    n = int(torch.tensor(shape).prod()) if shape else 1
    inputs = T.make_kl_inputs(n, 16, 33, ref_d=8, device=device)
    flat = rk.linear_kl(*inputs[:4], backend=backend)
    leaf = inputs.hidden.view(*shape, 16).requires_grad_()
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    kl = rk.linear_kl(leaf, inputs.weight, inputs.ref_hidden.view(*shape, 8), inputs.ref_weight, mask, backend=backend)
    assert kl.shape == shape
    torch.testing.assert_close(kl.flatten(), flat, rtol=1e-6, atol=1e-6)
    kl.sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_upstream_from_a_sum_is_expanded(backend, device):
    inputs = T.make_kl_inputs(65, 16, 300, device=device)
    grads = []
    for reduce in (torch.sum, lambda kl: kl @ torch.ones(65, device=device)):
        leaves = T.leaves_of(inputs[:2])
        grads.append(torch.autograd.grad(reduce(rk.linear_kl(*leaves, *inputs[2:4], backend=backend)), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_budget_of_8_mebibytes_is_still_right(backend, device, small_budget):
    """Rows go through in several chunks, in forward (wide hidden states) and in backward (many rows of dlogits)."""
    op = functools.partial(rk.linear_kl, backend=backend)
    for n, d, ref_d, v in ((1000, 64, 48, 2100), (1700, 64, 1040, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            T.check_linear_kl(op, T.make_kl_inputs(n, d, v, ref_d=ref_d, dtype=dtype, masked=0.2, device=device))


def test_the_same_gradient_twice_has_the_same_bits(backend, device):
    inputs = T.make_kl_inputs(130, 64, 2050, dtype=torch.bfloat16, device=device)

    def grads():
        leaves = T.leaves_of(inputs[:2])
        return torch.autograd.grad(rk.linear_kl(*leaves, *inputs[2:4], backend=backend).sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))
