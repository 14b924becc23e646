"""Packed sequences (cu_seqlens, position_ids) give what the same sequences give as padded rows."""

import math
import random

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.covering import every_pair
from tests.kernels.packed_batches import Packed, assert_same, both_forms

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [
    [2, 3],  # the shortest that predict anything
    [7, 1, 12, 0, 5, 1],  # of one token and of none: nothing is predicted there
    [64, 33, 128, 3],  # row tiles of 64: one that a sequence fills, and some that sequences share
    [9],  # one sequence: the whole row
]


@pytest.mark.parametrize(
    ("lengths", "dtype", "options"), every_pair(LENGTHS, DTYPES, [{}, {"average": True}, {"shift": False}])
)
def test_equals_the_padded_form(backend, device, lengths, dtype, options):
    batch = Packed(lengths, dtype=dtype, device=device)

    def op(leaves, hidden, labels, packing):
        return rk.sequence_logprobs(
            hidden, leaves[1], labels, leaves[2], backend=backend, temperature=0.7, **options, **packing
        ).logprobs

    assert_same(backend, *both_forms(batch, op), dtype)
    packed = rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, backend=backend)
    hidden, labels = batch.padded(batch.hidden)
    padded = rk.sequence_logprobs(hidden, batch.weight, labels, backend=backend)
    assert packed.logprobs.dtype == torch.float32 and packed.logprobs.shape == (len(lengths),)
    assert torch.equal(packed.token_counts, padded.token_counts) and packed.token_counts.dtype == torch.int64


@pytest.mark.parametrize("options", [{}, {"average": True}, {"shift": False}])
def test_float64_of_the_reference(device, options):
    batch = Packed(LENGTHS[1], dtype=torch.float64, device=device)

    def op(leaves, hidden, labels, packing):
        head = (leaves[1], labels, leaves[2])
        return rk.sequence_logprobs(hidden, *head, backend="reference", **options, **packing).logprobs

    packed, padded = both_forms(batch, op)
    assert packed[0].dtype == torch.float64
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-14, atol=1e-14)
    assert_same("reference", packed, padded, torch.float64)


def test_any_lengths_equal_each_sequence_alone(backend, device):
    """Lengths drawn at random, empty and single ones among them, and every kind of packing for each draw."""
    draw = random.Random(8)
    for seed in range(12):
        lengths = [draw.choice((0, 1, 2, 3, 5, 17, 40)) for _ in range(draw.randint(1, 9))]
        batch = Packed(lengths, d=8, v=17, device=device, seed=seed)
        options = {"average": draw.random() < 0.5, "shift": draw.random() < 0.7, "backend": backend}
        alone = [
            rk.sequence_logprobs(hidden[None], batch.weight, labels[None], **options)
            for hidden, labels in zip(batch.hidden.split(lengths), batch.labels.split(lengths), strict=True)
        ]
        got = rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, **options)
        want = torch.cat([one.logprobs for one in alone])
        torch.testing.assert_close(got.logprobs, want, rtol=2e-6, atol=2e-6)
        assert backend != "native" or torch.equal(got.logprobs, want), lengths
        assert torch.equal(got.token_counts, torch.cat([one.token_counts for one in alone])), lengths
        filled = [i for i, length in enumerate(lengths) if length]  # position_ids cannot tell of an empty one
        again = rk.sequence_logprobs(
            batch.hidden, batch.weight, batch.labels, position_ids=batch.position_ids(), **options
        )
        assert torch.equal(again.logprobs, got.logprobs[filled])
        assert torch.equal(again.token_counts, got.token_counts[filled])


def test_no_target_crosses_a_boundary(backend, device):
    """A sequence's last token predicts nothing, and its first label is never read: it may be no token at all."""
    batch = Packed([4, 6, 1, 5], d=8, v=17, masked=0.0, device=device)
    firsts, lasts = batch.cu[:-1], batch.cu[1:] - 1
    labels, hidden = batch.labels.clone(), batch.hidden.clone()
    labels[:] = 3
    plain = rk.sequence_logprobs(hidden, batch.weight, labels, cu_seqlens=batch.cu, backend=backend)
    assert plain.token_counts.tolist() == [3, 5, 0, 4]
    labels[firsts], hidden[lasts] = 10**6, math.nan
    leaves = T.leaves_of((hidden, batch.weight))
    got = rk.sequence_logprobs(*leaves, labels, cu_seqlens=batch.cu, backend=backend)
    torch.testing.assert_close(got.logprobs, plain.logprobs, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.token_counts, plain.token_counts)
    got.logprobs.sum().backward()
    silent = torch.zeros(16, dtype=torch.bool, device=device).index_fill(0, lasts, True)
    assert torch.equal((leaves[0].grad == 0).all(-1), silent) and leaves[1].grad.isfinite().all()


def test_what_one_sequence_holds_reaches_no_other(backend, device):
    """Not even NaN, as it would through differences of a running sum."""
    batch = Packed([5, 6, 4], d=8, v=17, masked=0.0, device=device)
    want = rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, backend=backend)
    hidden = batch.hidden.clone()
    hidden[6:10] = math.nan
    leaves = T.leaves_of((hidden, batch.weight))
    got = rk.sequence_logprobs(*leaves, batch.labels, cu_seqlens=batch.cu, backend=backend).logprobs
    torch.testing.assert_close(got[[0, 2]], want.logprobs[[0, 2]], rtol=1e-6, atol=1e-6)
    assert got[1].isnan()
    (grad,) = torch.autograd.grad(got[[0, 2]].sum(), leaves[:1])
    assert grad[:5].isfinite().all() and grad[11:].isfinite().all()


def test_long_sums_are_rounded_once(backend, device):
    """fp64 sums: adding 1200 fp32 numbers one by one would be off in the last digits, and differ from padded rows."""
    batch = Packed([1200, 37, 700], d=8, v=17, masked=0.0, device=device)
    per_token = rk.linear_logprobs(batch.hidden, batch.weight, batch.labels, backend=backend).logprobs
    want = torch.stack([part.double().sum() for part in per_token.split(batch.lengths)]).float()
    got = rk.sequence_logprobs(
        batch.hidden, batch.weight, batch.labels, shift=False, cu_seqlens=batch.cu, backend=backend
    )
    assert torch.equal(got.logprobs, want)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_and_empty_sequences_are_0_with_zero_gradient(backend, device, average, dtype):
    batch = Packed([0, 5, 0, 0, 6, 4, 0], d=8, v=17, dtype=dtype, masked=0.0, device=device)
    hidden, labels = batch.hidden.clone(), batch.labels.clone()
    labels[5:11], hidden[5:11] = -100, math.nan
    leaves = T.leaves_of((hidden, batch.weight))
    got = rk.sequence_logprobs(*leaves, labels, cu_seqlens=batch.cu, average=average, backend=backend)
    assert got.token_counts.tolist() == [0, 3, 0, 0, 0, 2, 0]
    assert [value == 0 for value in got.logprobs.tolist()] == [count == 0 for count in got.token_counts.tolist()]
    got.logprobs.sum().backward()
    assert (leaves[0].grad[5:11] == 0).all() and (leaves[0].grad[2:4] != 0).any()
    assert leaves[0].grad.isfinite().all() and leaves[1].grad.isfinite().all()


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]])  # no sequences; one; two, all of them empty
@pytest.mark.parametrize("shift", [True, False])
def test_no_tokens(backend, device, cu, shift):
    hidden, weight = torch.zeros(0, 8, device=device).requires_grad_(), torch.randn(17, 8).to(device)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    bounds = torch.tensor(cu, device=device)
    got = rk.sequence_logprobs(hidden, weight, labels, shift=shift, cu_seqlens=bounds, backend=backend)
    assert got.logprobs.tolist() == [0.0] * (len(cu) - 1) and got.token_counts.tolist() == [0] * (len(cu) - 1)
    got.logprobs.sum().backward()
    assert hidden.grad.shape == (0, 8)
    got = rk.sequence_logprobs(hidden, weight, labels, shift=shift, position_ids=labels, backend=backend)
    assert got.logprobs.shape == got.token_counts.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_flat_or_in_one_row_in_either_integer_type(backend, device, dtype):
    batch = Packed([4, 6, 1, 5], d=8, v=17, device=device)
    flat = (batch.hidden, batch.weight, batch.labels)
    row = (batch.hidden[None], batch.weight, batch.labels[None])
    want = rk.sequence_logprobs(*flat, cu_seqlens=batch.cu, backend=backend)
    positions = batch.position_ids().to(dtype)
    for args, packing in (
        (flat, {"cu_seqlens": batch.cu.to(dtype)}),
        (row, {"cu_seqlens": batch.cu.to(dtype)}),
        (flat, {"position_ids": positions}),
        (row, {"position_ids": positions[None]}),
    ):
        got = rk.sequence_logprobs(*args, backend=backend, **packing)
        assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.token_counts, want.token_counts)


def test_rows_of_position_ids_are_numbered_one_after_another(backend, device):
    """Each row begins a sequence even where the row before it ended in the middle of its own."""
    batch = Packed([4, 3, 7, 1, 6], d=8, v=17, device=device)  # three rows of seven
    want = rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, backend=backend)
    hidden, labels = batch.hidden.view(3, 7, 8), batch.labels.view(3, 7)
    positions = batch.position_ids().view(3, 7)
    got = rk.sequence_logprobs(hidden, batch.weight, labels, position_ids=positions, backend=backend)
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.token_counts, want.token_counts)


def test_ignore_index(backend, device):
    batch = Packed([4, 6, 1, 5], d=8, v=17, device=device)
    want = rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, backend=backend)
    labels = torch.where(batch.labels == -100, -7, batch.labels)
    got = rk.sequence_logprobs(
        batch.hidden, batch.weight, labels, cu_seqlens=batch.cu, ignore_index=-7, backend=backend
    )
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.token_counts, want.token_counts)
