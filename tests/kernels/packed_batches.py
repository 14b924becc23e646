"""A batch of sequences in both forms, packed and padded, and how equal what they give has to be."""

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf_kernels import testing as T


class Packed:
    """hidden [N, D], weight, labels [N], bias, with the first two tokens of each sequence and some others masked."""

    def __init__(self, lengths, d=33, v=129, *, dtype=torch.float32, masked=0.3, device="cpu", seed=0):
        self.lengths = list(lengths)
        head = T.make_head(sum(lengths), d, v, dtype=dtype, bias=True, masked=masked, seed=seed, device=device)
        self.hidden, self.weight, self.labels, self.bias = head
        self.cu = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
        for start, length in zip(self.cu[:-1].tolist(), lengths, strict=True):
            self.labels[start : start + min(2, max(0, length - 1))] = -100
        self.leaves = (self.hidden, self.weight, self.bias)

    def position_ids(self):
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.cu.device)

    def padded(self, hidden, labels=None):
        """hidden [S, T, D] and labels [S, T]; gradients reach the flat hidden."""
        labels = self.labels if labels is None else labels
        return tuple(
            pad_sequence(tensor.split(self.lengths), batch_first=True, padding_value=value)
            for tensor, value in ((hidden, 0.0), (labels, -100))
        )


def both_forms(batch, function):
    """function(leaves, hidden, labels, packing) on the packed form and on the padded one -> two (value, gradients)."""
    results = []
    for padded in (False, True):
        leaves = T.leaves_of(batch.leaves)
        form = (*batch.padded(leaves[0]), {}) if padded else (leaves[0], batch.labels, {"cu_seqlens": batch.cu})
        value = function(leaves, *form)
        upstream = T.randn(*value.shape, seed=3, device=value.device)
        results.append((value.detach(), T.gradients([value], [upstream], leaves)))
    return results


def assert_same(backend, packed, padded, dtype):
    """Equal values, to the bit where a row's bits do not depend on its neighbours; gradients as rounding allows."""
    if backend == "native":
        assert torch.equal(packed[0], padded[0])
    torch.testing.assert_close(packed[0], padded[0], rtol=2e-6, atol=2e-6)
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}[dtype]
    for got, want in zip(packed[1], padded[1], strict=True):
        assert got.dtype == want.dtype and T.relative_error(got, want) <= limit
