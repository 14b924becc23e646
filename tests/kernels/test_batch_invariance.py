"""A row's bits do not depend on its neighbours, its position, the number of rows, or the number of threads.

A promise of the compiled kernels: the reference's matmuls belong to torch, which does not make it.
"""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 130  # three row tiles, the last with two rows
SHAPES = [  # D, V
    (33, 300),  # odd D: the GEMM's remainder; a vocabulary tile and a bit
    (64, 4100),  # several tiles and splits, the last of four tokens
    (1040, 700),  # narrower tiles, several blocks along K
]
SELECTIONS = {
    "alone, first": [0],
    "alone, from inside a tile": [37],
    "alone, the last": [129],
    "two tiles apart": [3, 128],
    "a prefix of 17": range(17),  # GEMMs go over a multiple of 16 rows
    "two steps": range(32),
    "from inside a step": range(71, 104),
    "one full tile": range(64),
    "one row over": range(65),
    "from the middle": range(60, 125),
    "reversed": range(129, -1, -1),
    "shuffled": [(7 * i + 5) % 130 for i in range(130)],
    "one row 200 times": [41] * 200,
}


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


def logprob_rows(head, index, backend, **changes):
    head = head._replace(**changes)
    out = rk.linear_logprobs(
        head.hidden[index], head.weight, head.targets[index], head.bias, outputs=T.OUTPUTS, backend=backend
    )
    return torch.stack(tuple(out))


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture(scope="module")
def references():
    """All rows at once with one thread, computed once for each case."""
    return {}


def with_one_thread(references, key, compute):
    if key not in references:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        references[key] = compute()
        torch.set_num_threads(before)
    return references[key]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_logprobs(native, device, references, threads, shape, dtype):
    head = T.make_head(ROWS, *shape, dtype=dtype, bias=True, device=device)
    every = list(range(ROWS))
    want = with_one_thread(references, ("logprobs", shape, dtype), lambda: logprob_rows(head, every, native))
    assert same_bits(logprob_rows(head, every, native), want)
    for name, rows in SELECTIONS.items():
        rows = list(rows)
        assert same_bits(logprob_rows(head, rows, native), want[:, rows]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprobs_among_other_neighbours(native, device, threads, dtype):
    """Neighbours that are huge, not finite, or ignored (so that compaction moves the row) change nothing."""
    head = T.make_head(ROWS, 64, 4100, dtype=dtype, bias=True, device=device)
    every = list(range(ROWS))
    kept = torch.arange(ROWS, device=device) % 9 == 4
    want = logprob_rows(head, every, native)[:, kept]
    for other in (1000.0, math.nan, math.inf, 0.0):
        hidden = torch.where(kept[:, None], head.hidden, torch.full_like(head.hidden, other))
        assert same_bits(logprob_rows(head, every, native, hidden=hidden)[:, kept], want), other
    targets = torch.where(kept, head.targets, -100)
    assert same_bits(logprob_rows(head, every, native, targets=targets)[:, kept], want)


@pytest.mark.parametrize("budget", [8, 256])
def test_linear_logprobs_whatever_the_budget(native, device, budget):
    """Rows are cut into chunks by the budget, the vocabulary is not."""
    head = T.make_head(1700, 1040, 700, dtype=torch.bfloat16, device=device)
    want = logprob_rows(head, list(range(65)), native)
    try:
        rk.set_workspace_budget(budget)
        assert same_bits(logprob_rows(head, list(range(1700)), native)[:, :65], want)
    finally:
        rk.set_workspace_budget(None)


def test_asking_for_more_outputs_changes_no_bits(native, device):
    head = T.make_head(70, 64, 4100, dtype=torch.bfloat16, device=device)
    full = rk.linear_logprobs(*head, outputs=T.OUTPUTS, backend=native)
    for outputs in ((), ("entropy",), ("is_top1",), ("mean_logit", "log_sum_sq_probs")):
        some = rk.linear_logprobs(*head, outputs=outputs, backend=native)
        for name in ("logprobs", "logsumexp", *outputs):
            assert same_bits(getattr(some, name), getattr(full, name)), (outputs, name)


def test_requiring_a_gradient_changes_no_bits(native, device):
    """linear_dpo_loss may keep its logits for backward; the log-probs it sees are those of a rollout."""
    head = T.make_head(128, 64, 4100, dtype=torch.bfloat16, device=device)
    plain = rk.linear_logprobs(*head, backend=native).logprobs
    leaves = T.leaves_of(head[:2])
    assert same_bits(rk.linear_logprobs(*leaves, head.targets, backend=native).logprobs.detach(), plain)
    labels = head.targets.view(2, 64)
    fused = rk.linear_dpo_loss(
        leaves[0].view(2, 64, 64), leaves[1], labels, torch.zeros(2, device=device), backend=native
    )
    assert fused.loss.requires_grad
    sums = rk.sequence_logprobs(head.hidden.view(2, 64, 64), head.weight, labels, backend=native).logprobs
    assert same_bits(fused.policy_logps, sums)


@pytest.mark.parametrize(
    ("threads", "dtype", "direction", "kl"),
    every_pair([1, 2, 3], DTYPES, ["policy_ref", "ref_policy"], [None, 1e-6]),  # both formulas of a KL
    indirect=["threads"],
)
def test_linear_kl(native, device, references, threads, dtype, direction, kl):
    inputs = T.make_kl_inputs(ROWS, 48, 2100, kl=kl, dtype=dtype, bias=True, device=device)

    def rows_of(index, mask=None, hidden=inputs.hidden):
        return rk.linear_kl(
            hidden[index], inputs.weight, inputs.ref_hidden[index], inputs.ref_weight, mask, bias=inputs.bias,
            ref_bias=inputs.ref_bias, direction=direction, backend=native,
        )  # fmt: skip

    every = list(range(ROWS))
    want = with_one_thread(references, ("kl", dtype, direction, kl), lambda: rows_of(every))
    for name, rows in SELECTIONS.items():
        rows = list(rows)
        assert same_bits(rows_of(rows), want[rows]), name
    kept = torch.arange(ROWS, device=device) % 9 == 4
    assert same_bits(rows_of(every, mask=kept)[kept], want[kept])
    hidden = torch.where(kept[:, None], inputs.hidden, torch.full_like(inputs.hidden, math.nan))
    assert same_bits(rows_of(every, hidden=hidden)[kept], want[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_for_any_number_of_threads(native, device, dtype):
    head = T.make_head(200, 64, 4100, dtype=dtype, bias=True, masked=0.3, device=device)
    inputs = T.make_kl_inputs(200, 64, 2100, dtype=dtype, bias=True, device=device)
    upstream = T.randn(200, seed=4, device=device)

    def grads():
        leaves = T.leaves_of((head.hidden, head.weight, head.bias))
        out = rk.linear_logprobs(leaves[0], leaves[1], head.targets, leaves[2], outputs=("entropy",), backend=native)
        results = list(torch.autograd.grad([out.logprobs, out.entropy], leaves, [upstream, upstream]))
        policy = T.leaves_of((inputs.hidden, inputs.weight, inputs.bias))
        kl = rk.linear_kl(
            policy[0], policy[1], inputs.ref_hidden, inputs.ref_weight, bias=policy[2], ref_bias=inputs.ref_bias,
            backend=native,
        )  # fmt: skip
        results += torch.autograd.grad(kl, policy, upstream)
        batch = T.leaves_of((head.hidden.view(4, 50, 64), head.weight))
        labels = head.targets.view(4, 50)
        fused = rk.linear_dpo_loss(*batch, labels, torch.zeros(4, device=device), backend=native)
        return results + list(torch.autograd.grad(fused.loss, batch))

    torch.set_num_threads(1)
    want = grads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(grads(), want, strict=True)), threads
