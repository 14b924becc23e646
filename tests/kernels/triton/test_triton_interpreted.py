"""Triton ops as a captured or traced graph calls them: all rows are gone over, and some do not count. Interpreted."""

import importlib

import pytest
import torch

from rlhf_kernels import testing as T

N, D, V = 70, 16, 140
F32 = torch.float32
PLAIN, GEMMA = (1.0, 0.0, 1.0), (1.3, 5.0, 0.7)


def ways(mask):
    """The rows that count gathered, and all rows masked. (Bits may differ: numpy's products depend on the position.)"""
    return (mask.nonzero().squeeze(1), False), (None, True)


def agree(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        assert a.isfinite().all()


@pytest.mark.parametrize("transform", [PLAIN, GEMMA])
def test_masked_logprobs(transform):
    from rlhf_kernels.logprob import triton_ops as ops

    hidden, weight, targets, bias = T.make_head(N, D, V, masked=0.4, bias=True)
    counts = targets != -100
    hidden[~counts] = float("nan")
    up = torch.where(counts, T.randn(N, seed=3), float("nan"))
    results = []
    for way in ways(counts):
        out = ops.forward_op(hidden, weight, targets, bias, *transform, -100, F32, True, True, True, True, False, *way)
        grads = ops.backward_op(
            up, up, up, hidden, weight, targets, bias, *out[1:4], out[7], *transform, -100, F32, True, True, True, *way
        )
        results.append((*out[:7], *grads))
    agree(results[1], results[0])
    assert not results[1][0][~counts].any() and not results[1][7][~counts].any()


@pytest.mark.parametrize("transform", [PLAIN, GEMMA])
def test_masked_logprobs_of_a_frozen_head(transform):
    from rlhf_kernels.logprob import triton_ops as ops

    hidden, weight, targets, bias = T.make_head(N, D, V, masked=0.4, bias=True)
    hidden[targets == -100] = float("nan")
    results = [
        ops.frozen_op(hidden, weight, targets, bias, *transform, -100, F32, True, True, True, True, 0, *way)
        for way in ways(targets != -100)
    ]
    agree(*results)
    assert not results[1][7][targets == -100].any() and results[1][7].any()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_opcheck_of_a_frozen_head(dtype):
    from rlhf_kernels.logprob import triton_ops as ops

    hidden, weight, targets, bias = T.make_head(N, D, V, masked=0.4, bias=True)
    inputs = (hidden.requires_grad_(), weight, targets, bias, *GEMMA, -100, dtype, True, True, False, False, 0)
    for way in ways(targets != -100):
        torch.library.opcheck(ops.frozen_op, (*inputs, *way))
    directions = T.randn(N, D, seed=4)
    torch.library.opcheck(ops.frozen_backward_op, (up_of(N), directions, targets, -100, dtype))


@pytest.mark.parametrize("policy_ref", [True, False])
def test_masked_kl(policy_ref):
    from rlhf_kernels.kl import triton_ops as ops

    hidden, weight, targets, bias = T.make_head(N, D, V, masked=0.4, bias=True)
    ref = T.make_head(N, D // 2, V, seed=50)
    mask = targets != -100
    hidden[~mask] = float("nan")
    ref.hidden[~mask] = float("inf")
    up = torch.where(mask, T.randn(N, seed=3), float("nan"))
    inputs = (hidden, weight, bias, *PLAIN, F32, ref.hidden, ref.weight, None, *GEMMA, F32, mask, policy_ref)
    results = []
    for way in ways(mask):
        kl, stats, cache = ops.forward_op(*inputs, 0, *way)
        grads = ops.backward_op(up, kl, stats, cache, *inputs, True, True, True, *way)
        results.append((kl, stats, *grads))
    agree(results[1], results[0])
    assert not results[1][0][~mask].any() and not results[1][2][~mask].any()


@pytest.mark.parametrize("what", ["logprob", "frozen", "kl"])
def test_any_step_loads_what_a_captured_one_launches(monkeypatch, what):
    """Nothing can be loaded while a graph is captured. Triton makes a variant for what is None, for an integer's being
    1 or a multiple of 16, and for each constant: the same with masked rows, which are gathered, and without."""
    hidden, weight, targets, _ = T.make_head(N, D, V)
    room = "logprob" if what == "frozen" else what
    module = importlib.import_module(f"rlhf_kernels.{room}.triton_kernels")
    ops, launch = importlib.import_module(f"rlhf_kernels.{room}.triton_ops"), module.launch
    launched = []

    def variant(value):
        return (value == 1, value % 16 == 0) if type(value) is int else getattr(value, "dtype", type(value))

    def record(kernel, grid, *args, **options):
        launched.append((kernel, [variant(arg) for arg in args], options))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(importlib.import_module("rlhf_kernels.logprob.triton_frozen"), "launch", record)

    def launches(*way):
        launched.clear()
        if what == "frozen":
            ops.frozen_op(hidden, weight, targets, None, *PLAIN, -100, F32, *[False] * 4, 0, *way)
            return list(launched)
        if what == "logprob":
            results = ops.forward_op(hidden, weight, targets, None, *PLAIN, -100, F32, *[False] * 4, 0, *way)
            up, statistics, inputs = (up_of(N), None, None), (*results[1:4], results[7]), (targets, None)
            ops.backward_op(*up, hidden, weight, *inputs, *statistics, *PLAIN, -100, F32, True, True, False, *way)
        else:
            side = (weight, None, *PLAIN, F32)
            inputs = (hidden, *side, hidden * 0.9, *side, torch.ones(N, dtype=torch.bool), True)
            results = ops.forward_op(*inputs, 0, *way)
            ops.backward_op(up_of(N), *results, *inputs, True, True, False, *way)
        return list(launched)

    captured = launches(None, True)
    assert len(captured) > 2 and launches(None, False) == captured
    assert launches(torch.arange(N - 3), False) == captured


def up_of(rows):
    return T.randn(rows, seed=3)


def test_strange_rows_and_targets():
    """A target that is no token: NaN, and its gradient is that of its logsumexp. All logits -inf or one NaN: NaN."""
    from rlhf_kernels.logprob import triton_ops as ops

    hidden, weight, _, bias = T.make_head(4, D, V, bias=True)
    targets = torch.tensor([V, -5, 2**40, 7])
    out = ops.forward_op(hidden, weight, targets, bias, *PLAIN, -100, F32, True, True, True, True, False, None, True)
    assert out[0][:3].isnan().all() and not out[4][:3].any() and out[0][3].isfinite()
    assert out[2].isfinite().all()
    impossible = torch.full_like(bias, -float("inf"))
    for b in (impossible, torch.where(torch.arange(V) == V - 1, float("nan"), bias)):
        out = ops.forward_op(
            hidden, weight, targets, b, *PLAIN, -100, F32, False, False, False, False, False, None, True
        )
        assert out[0].isnan().all()
    impossible[7] = 0.0  # one token is possible
    out = ops.forward_op(
        hidden, weight, torch.tensor([7, 8, 7, 7]), impossible, *PLAIN, -100, F32, True, False, False, True, False,
        None, True,
    )  # fmt: skip
    assert out[0].tolist() == [0.0, -float("inf"), 0.0, 0.0] and not out[3].any() and not out[6].any()
