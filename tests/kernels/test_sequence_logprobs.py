"""sequence_logprobs: sums over unmasked tokens, the shift, the average, fully masked rows."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, T, D, V
    (1, 2, 8, 5),  # the shortest sequence that predicts anything
    (3, 23, 33, 129),  # odd everywhere; 69 rows: two row tiles that cut a sequence
    (4, 64, 48, 2050),  # sequences of exactly one row tile
]


def make(b, t, d, v, *, device, masked=0.3, **options):
    """hidden [B, T, D], weight, labels [B, T] with the prompt's first two tokens and a random part masked, bias."""
    hidden, weight, labels, bias = T.make_head(b * t, d, v, masked=masked, device=device, **options)
    labels = labels.view(b, t).clone()
    labels[:, : min(2, t - 1)] = -100
    return hidden.view(b, t, d), weight, labels, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend, device, shape, dtype):
    """Judged as sums: the limits of the per-token values, times the number of tokens in the longest sequence."""
    hidden, weight, labels, bias = make(*shape, dtype=dtype, bias=True, device=device)
    upstream = T.randn(shape[0], seed=3, device=device)
    results = []
    for op, as_dtype in (
        (None, None),
        (T.plain_sequence_logprobs, torch.float32),
        (T.plain_sequence_logprobs, torch.float64),
    ):
        leaves = T.leaves_of((hidden, weight, bias), as_dtype)
        if op is None:
            out = rk.sequence_logprobs(leaves[0], leaves[1], labels, leaves[2], backend=backend)
            assert torch.equal(out.token_counts, (labels[:, 1:] != -100).sum(-1))
            assert out.token_counts.dtype == torch.int64 and out.logprobs.dtype == torch.float32
            value = out.logprobs
        else:
            value = op(leaves[0], leaves[1], labels, leaves[2], dtype=as_dtype)
        results.append((value.detach(), T.gradients([value], [upstream], leaves)))
    (got, grads), (eager, eager_grads), (truth, true_grads) = results
    tokens = shape[1] - 1
    T.assert_no_worse_than_eager(got / tokens, eager / tokens, truth / tokens)
    T.check_gradients((grads, eager_grads, true_grads), dtype)


def test_shift_follows_hugging_face(backend, device):
    """Position t predicts labels[:, t + 1]; the first label predicts nothing and the last position is not predicted."""
    hidden, weight, labels, _ = make(3, 9, 8, 17, device=device)
    per_token = rk.linear_logprobs(hidden[:, :-1], weight, labels[:, 1:].contiguous(), backend=backend).logprobs
    got = rk.sequence_logprobs(hidden, weight, labels, backend=backend)
    torch.testing.assert_close(got.logprobs, per_token.sum(-1), rtol=1e-6, atol=1e-6)
    first_masked = labels.clone()
    first_masked[:, 0] = -100
    again = rk.sequence_logprobs(hidden, weight, first_masked, backend=backend)
    assert torch.equal(got.logprobs, again.logprobs) and torch.equal(got.token_counts, again.token_counts)


def test_without_shift_labels_are_targets(backend, device):
    hidden, weight, labels, bias = make(3, 9, 8, 17, bias=True, device=device)
    got = rk.sequence_logprobs(hidden, weight, labels, bias, shift=False, backend=backend)
    per_token = rk.linear_logprobs(hidden, weight, labels, bias, backend=backend).logprobs
    torch.testing.assert_close(got.logprobs, per_token.sum(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(got.token_counts, (labels != -100).sum(-1))


def test_average_divides_by_the_counted_tokens(backend, device):
    hidden, weight, labels, _ = make(3, 9, 8, 17, device=device)
    labels[1] = -100
    total = rk.sequence_logprobs(hidden, weight, labels, backend=backend)
    mean = rk.sequence_logprobs(hidden, weight, labels, average=True, backend=backend)
    assert torch.equal(mean.token_counts, total.token_counts) and mean.token_counts[1] == 0
    torch.testing.assert_close(mean.logprobs, total.logprobs / total.token_counts.clamp(min=1))


def test_options_reach_the_head(backend, device):
    hidden, weight, labels, bias = make(2, 9, 8, 17, bias=True, device=device)
    options = {"temperature": 0.7, "logit_scale": 0.3, "logit_softcap": 2.0}
    got = rk.sequence_logprobs(hidden, weight, labels, bias, backend=backend, **options)
    truth = T.plain_sequence_logprobs(hidden, weight, labels, bias, **options)
    torch.testing.assert_close(got.logprobs.double(), truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fully_masked_row_is_0_with_zero_gradient(backend, device, average, dtype):
    """Never 0 / 0: not in the mean, not in the gradient, not where padding holds NaN."""
    hidden, weight, labels, _ = make(3, 9, 8, 17, dtype=dtype, device=device)
    labels[1] = -100
    hidden = hidden.clone()
    hidden[1] = math.nan
    leaves = T.leaves_of((hidden, weight))
    out = rk.sequence_logprobs(*leaves, labels, average=average, backend=backend)
    assert out.logprobs[1] == 0 and out.token_counts[1] == 0
    out.logprobs.sum().backward()
    assert (leaves[0].grad[1] == 0).all()
    assert leaves[0].grad.isfinite().all() and leaves[1].grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1)])  # no sequences; no tokens; one token, so nothing to predict
@pytest.mark.parametrize("shift", [True, False])
def test_empty(backend, device, shape, shift):
    hidden = torch.randn(*shape, 8).to(device).requires_grad_()
    labels = torch.full(shape, -100, device=device)
    if shift:
        labels = labels.fill_(3)[:, :]
        labels[:, 1:] = -100
    out = rk.sequence_logprobs(hidden, torch.randn(17, 8).to(device), labels, shift=shift, backend=backend)
    assert out.logprobs.tolist() == [0.0] * shape[0] and out.token_counts.tolist() == [0] * shape[0]
    out.logprobs.sum().backward()
    assert (hidden.grad == 0).all()


def test_ignore_index(backend, device):
    hidden, weight, labels, _ = make(3, 9, 8, 17, device=device)
    want = rk.sequence_logprobs(hidden, weight, labels, backend=backend)
    relabelled = torch.where(labels == -100, -7, labels)
    got = rk.sequence_logprobs(hidden, weight, relabelled, ignore_index=-7, backend=backend)
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.token_counts, want.token_counts)
