"""More than 2^31 logits, and more than 2^31 weights: no offset is 32 bits wide."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

N, V = 17_000, 130_000  # 2.21e9 logits, 2^31 = 2.15e9


def test_more_than_2_to_31_logits(native, device):
    """The last rows, whose logits are past the limit, have the bits that they have alone."""
    head = T.make_head(N, 2, V, dtype=torch.bfloat16, device=device)
    everything = rk.linear_logprobs(*head, backend=native).logprobs
    some = torch.tensor([0, 8000, N - 2, N - 1], device=device)
    alone = rk.linear_logprobs(head.hidden[some], head.weight, head.targets[some], backend=native).logprobs
    assert torch.equal(everything[some], alone)


@pytest.mark.slow
def test_gradient_of_more_than_2_to_31_logits(native, device):
    """An upstream into the last row alone leaves what that row alone leaves."""
    head = T.make_head(N, 2, V, dtype=torch.bfloat16, device=device)
    all_rows, last_row = T.leaves_of(head[:2]), T.leaves_of((head.hidden[-1:], head.weight))
    rk.linear_logprobs(*all_rows, head.targets, backend=native).logprobs[-1].backward()
    rk.linear_logprobs(*last_row, head.targets[-1:], backend=native).logprobs.sum().backward()
    assert torch.equal(all_rows[0].grad[-1:], last_row[0].grad)
    assert (all_rows[0].grad[:-1] == 0).all()
    assert T.relative_error(all_rows[1].grad, last_row[1].grad) < 4e-3


@pytest.mark.slow
def test_more_than_2_to_31_weights(native, device):
    """4.3 GB of head: only its first and its last row are not zero, so the answer is known."""
    v, d = (1 << 21) + 3, 1025
    weight = torch.zeros(v, d, dtype=torch.bfloat16, device=device)
    weight[0], weight[-1] = -0.01, 0.01
    z = weight[-1, 0].double().item() * d
    hidden = torch.ones(2, d, dtype=torch.bfloat16, device=device)
    out = rk.linear_logprobs(hidden, weight, torch.tensor([0, v - 1], device=device), backend=native)
    logsumexp = math.log(math.exp(z) + math.exp(-z) + v - 2)
    want = torch.tensor([-z - logsumexp, z - logsumexp], device=device)
    torch.testing.assert_close(out.logprobs, want, rtol=0, atol=2e-5)
