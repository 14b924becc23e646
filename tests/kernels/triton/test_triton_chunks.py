"""The Triton backend where rows go in chunks, and in backward the vocabulary in slices. On a GPU or interpreted."""

import functools

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from rlhf_kernels._triton import plan


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_chunks_and_groups(monkeypatch, device, dtype, op):
    """Three chunks of rows, forward and backward, and three slices of the vocabulary: sums over chunks, and copies of
    each."""
    from rlhf_kernels._triton import gradient

    monkeypatch.setattr(gradient, "plan_forward", lambda *_: 32)
    monkeypatch.setattr(gradient, "plan_backward", lambda *_: plan.BackwardPlan(256, 32))
    if op == "linear_logprobs":
        head = T.make_head(100, 33, 600, dtype=dtype, bias=True, masked=0.2, device=device)
        T.check_linear_logprobs(functools.partial(rk.linear_logprobs, backend="triton"), head)
    else:
        inputs = T.make_kl_inputs(100, 33, 600, ref_d=48, dtype=dtype, bias=True, masked=0.2, device=device)
        T.check_linear_kl(functools.partial(rk.linear_kl, backend="triton"), inputs)
