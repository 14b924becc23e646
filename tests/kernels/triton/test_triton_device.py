"""Triton on a GPU, which alone can show them: its tuner, TMA, graphs, compilation. Collected on CUDA alone."""

import math
from typing import NamedTuple

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytest.importorskip("triton")
from rlhf_kernels._triton import launch
from rlhf_kernels.kl import triton_kernels as kl_kernels
from rlhf_kernels.logprob import triton_kernels as logprob_kernels

TUNED = (logprob_kernels.fold, logprob_kernels.differentiate, kl_kernels.fold_kl, kl_kernels.differentiate_kl)
PLAIN_JIT = (logprob_kernels.merge, kl_kernels.merge_kl_splits)
DTYPES = [torch.bfloat16, torch.float32]
ROWS = 1160  # 10 blocks of 128 rows, the last of 8: a whole group of 8 blocks and a part of one
TUNED_ROWS = 2056  # 17 blocks of 128 rows: enough for the tuner
D, V = 72, 5003  # no multiple of a tile's depth, and rows that TMA can read; three splits and an odd vocabulary


@pytest.fixture(autouse=True)
def triton_runs(device):
    results = rk.available_backends(device)
    assert "triton" in results, results


class Case(NamedTuple):
    head: T.Head
    kl: T.KLInputs


def make(dtype, device, rows=ROWS):
    return Case(
        T.make_head(rows, D, V, dtype=dtype, device=device), T.make_kl_inputs(rows, D, V, dtype=dtype, device=device)
    )


def values(case, selected=slice(None), mask=None, everything=True):
    """Per-row results [results, rows] of the rows `selected`; where `mask` is false a row does not count."""
    head, inputs = case
    targets = head.targets[selected] if mask is None else torch.where(mask, head.targets[selected], -100)
    options = {"outputs": T.OUTPUTS, "logit_softcap": 30.0} if everything else {}
    results = rk.linear_logprobs(head.hidden[selected], head.weight, targets, backend="triton", **options)
    both = [
        rk.linear_kl(
            inputs.hidden[selected], inputs.weight, inputs.ref_hidden[selected], inputs.ref_weight, mask,
            direction=direction, backend="triton",
        )
        for direction in ("policy_ref", "ref_policy")
    ]  # fmt: skip
    return torch.stack([*(value for value in results if value is not None), *both])


def gradients(case, everything=True):
    """The gradients of log-probs (and entropy, through a soft cap) and of KL, in hidden and head."""
    head, inputs = case
    leaves, policy = T.leaves_of(head[:2]), T.leaves_of((inputs.hidden, inputs.weight))
    options = {"outputs": ("entropy",), "logit_softcap": 30.0} if everything else {}
    results = rk.linear_logprobs(*leaves, head.targets, backend="triton", **options)
    kl = rk.linear_kl(*policy, inputs.ref_hidden, inputs.ref_weight, backend="triton")
    upstream = T.randn(len(kl), seed=9, device=kl.device)
    total = (results.logprobs * upstream).sum() + (kl * upstream).sum()
    if everything:
        total = total + results.entropy.sum()
    return torch.autograd.grad(total, (*leaves, *policy))


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("everything", [False, True])  # two sizes of tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_the_tuner_chooses_the_bits_are_the_same(monkeypatch, device, dtype, everything):
    case = make(dtype, device)
    choices = launch.configs(torch.version.hip is not None)
    assert len(choices) > 1
    want = None
    for choice in choices:
        for kernel in TUNED:
            monkeypatch.setattr(kernel, "configs", [choice])
        results = values(case, everything=everything), *gradients(case, everything)
        assert all(bool(value.isfinite().all()) for value in results)
        want = want or results
        assert same_bits(results[0], want[0]), choice
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True)), choice


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(device, dtype):
    case = make(dtype, device, rows=330)
    want = values(case)
    for name, rows in {
        "one": [0],
        "one, from inside a tile": [137],
        "the last": [329],
        "two": [3, 328],
        "a full tile": range(128),
        "one over": range(129),
        "from the middle": range(60, 325),
        "reversed": range(329, -1, -1),
        "one 300 times": [41] * 300,
    }.items():
        rows = list(rows)
        assert same_bits(values(case, rows), want[:, rows]), name
    kept = torch.arange(330, device=device) % 9 == 4
    assert same_bits(values(case, mask=kept)[:, kept], want[:, kept]), "compacted"
    for other in (math.nan, math.inf, 1000.0):
        hidden = torch.where(kept[:, None], case.head.hidden, torch.full_like(case.head.hidden, other))
        assert same_bits(values(case._replace(head=case.head._replace(hidden=hidden)))[:, kept], want[:, kept]), other


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tma_changes_no_bits(monkeypatch, device, dtype, everything):
    if not launch.has_tma(device):
        pytest.skip("this GPU has no TMA")
    case = make(dtype, device)
    assert launch.uses_tma(case.head.hidden, case.head.weight, case.kl.ref_weight) == (dtype != torch.float32)
    want = values(case, everything=everything), *gradients(case, everything)
    for module in (logprob_kernels, kl_kernels):
        monkeypatch.setattr(module, "uses_tma", lambda *tensors: False)
    results = values(case, everything=everything), *gradients(case, everything)
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_rows_that_tma_cannot_read_are_read_by_pointers(device):
    """Rows that start off 16 bytes: the same numbers, so the same bits."""
    case = make(torch.bfloat16, device, rows=200)
    padded = [torch.nn.functional.pad(tensor, (1, 2))[:, 1:-2] for tensor in case.head[:2]]
    assert not any(launch.uses_tma(tensor) for tensor in padded)
    assert same_bits(values(case._replace(head=case.head._replace(hidden=padded[0], weight=padded[1]))), values(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_kl", "linear_dpo_loss"])
def test_one_compiled_graph_equals_eager(device, name, dtype):
    """Inductor's, forward and backward, with masked rows: it reads no counts and no addresses, so rows are masked and
    TMA is off, and the values have the same bits all the same."""
    torch.compiler.reset()
    head = T.make_head(260, D, V, dtype=dtype, masked=0.3, device=device)
    ref = T.make_head(260, D, V, dtype=dtype, seed=7, device=device)

    def op(hidden, weight):
        if name == "linear_kl":
            return rk.linear_kl(hidden, weight, ref.hidden, ref.weight, head.targets != -100, backend="triton")
        if name == "linear_dpo_loss":
            batch = hidden.view(2, 130, D), weight, head.targets.view(2, 130)
            return rk.linear_dpo_loss(*batch, torch.zeros(2, device=device), backend="triton").loss
        return rk.linear_logprobs(hidden, weight, head.targets, backend="triton").logprobs

    leaves, eager_leaves = T.leaves_of(head[:2]), T.leaves_of(head[:2])
    got, want = torch.compile(op, fullgraph=True)(*leaves), op(*eager_leaves)
    if name == "linear_dpo_loss":  # inductor adds a sequence's log-probs in an order of its own
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    else:
        assert same_bits(got.detach(), want.detach())
    results, eager = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), eager_leaves)
    limit = 3e-6 if dtype == torch.float32 else 4e-3  # sums over masked rows too are made in another order
    assert all(T.relative_error(a, b) <= limit for a, b in zip(results, eager, strict=True))
    torch.compiler.reset()


def test_nothing_is_compiled_or_tuned_again_when_the_number_of_rows_changes(device):
    def compiled():
        jits = [kernel.fn for kernel in TUNED] + list(PLAIN_JIT)
        kernels = sum(len(caches[0]) for jit in jits for caches in jit.device_caches.values())
        return kernels, sum(len(kernel.cache) for kernel in TUNED)

    def step(rows):
        case = make(torch.bfloat16, device, rows)
        values(case)
        gradients(case)

    step(TUNED_ROWS)
    step(256)  # takes the first choice, whether the tuner has taken that or not
    before = compiled()
    assert before[0] > 0
    for rows in (1, 17, 64, 130, 272, 999, TUNED_ROWS + 1):
        step(rows)
        assert compiled() == before, f"{rows} rows"
