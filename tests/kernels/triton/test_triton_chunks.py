"""The Triton backend where rows go in chunks, and in backward the vocabulary in slices. On a GPU or interpreted."""

import functools

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels._triton import plan


@pytest.mark.parametrize("op", ["linear_logprobs", "frozen", "linear_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_chunks_and_groups(monkeypatch, device, dtype, op):
    """Three chunks of rows, forward and backward, and three slices of the vocabulary: sums over chunks, and copies of
    each. Of a frozen head a slice is one split of the vocabulary."""
    from rlhf_kernels._triton import gradient

    monkeypatch.setattr(gradient, "plan_forward", lambda *_: 32)
    monkeypatch.setattr(gradient, "plan_backward", lambda *_: plan.BackwardPlan(256, 32))
    if op == "linear_logprobs":
        head = T.make_head(100, 33, 600, dtype=dtype, bias=True, masked=0.2, device=device)
        T.check_linear_logprobs(functools.partial(rk.linear_logprobs, backend="triton"), head)
    elif op == "frozen":
        check_frozen(monkeypatch, T.make_head(100, 33, 3001, dtype=dtype, bias=True, masked=0.2, device=device))
    else:
        inputs = T.make_kl_inputs(100, 33, 600, ref_d=48, dtype=dtype, bias=True, masked=0.2, device=device)
        T.check_linear_kl(functools.partial(rk.linear_kl, backend="triton"), inputs)


def check_frozen(monkeypatch, head):
    """One product is the fold's, the other the vendor's: none in backward."""
    from rlhf_kernels.logprob import triton_frozen, triton_kernels

    products, launched = [], []
    add_product, launch = triton_frozen.add_product, triton_kernels.launch

    def product(sums, a, b):
        products.append(len(a) * b.numel())
        add_product(sums, a, b)

    def record(kernel, *arguments, **options):
        launched.append(getattr(kernel, "fn", kernel).__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_frozen, "add_product", product)
    monkeypatch.setattr(triton_kernels, "launch", record)
    gradients = []
    for parts in (1, 64):
        monkeypatch.setattr(plan, "parts_at_once", lambda *_, parts=parts: parts)
        products.clear(), launched.clear()
        hidden = head.hidden.clone().requires_grad_()
        rk.linear_logprobs(hidden, head.weight, head.targets, head.bias, backend="triton").logprobs.sum().backward()
        gradients.append(hidden.grad)
        assert sum(products) == (head.targets != -100).sum() * head.weight.numel()
        assert launched.count("fold") == len(products) and set(launched) == {"fold", "merge"}
        assert len(products) > 3 or parts == 64
    assert T.relative_error(*gradients) < (1e-6 if head.hidden.dtype == torch.float32 else 4e-3)
