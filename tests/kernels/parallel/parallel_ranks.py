"""The common part of test_parallel.py's cases: several processes run them, and each reports its results."""

import functools
import json
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf_kernels import _triton, parallel
from rlhf_kernels import testing as T

BACKENDS = ("triton",) if _triton.INTERPRETED else ("native", "reference")
SPLITS = ("even", "uneven")
OPTIONS = {"temperature": 0.7, "logit_scale": -0.5, "logit_softcap": 3.0}
TIMEOUT = timedelta(seconds=60)


def run(cases, runs, folder):
    """`runs` [(number of ranks, names of cases)], in groups of the first ranks that are there. Writes {"ranks name":
    None or a traceback} to folder/<rank>.json after each case, and stops at a failure: others may be waiting in it."""
    torch.set_num_threads(1)
    rank, results = int(os.environ["RANK"]), {}
    for turn, (ranks, names) in enumerate(runs):
        if rank >= ranks:
            continue
        store = f"file://{Path(folder, f'store-{turn}').absolute()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        for name in names:
            began = time.monotonic()
            try:
                cases[name]()
                failure = None
            except Exception:
                failure = traceback.format_exc()
            print(f"rank {rank} of {ranks}: {name} took {time.monotonic() - began:.1f} s", flush=True)
            results[f"{ranks} {name}"] = failure
            Path(folder, f"{rank}.json").write_text(json.dumps(results))
            if failure:
                os._exit(1)
        dist.barrier()
        dist.destroy_process_group()


def bounds(vocab, split):
    """The bounds of this rank's rows of the head. Uneven: from four ranks on the second has none."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if split == "even":  # as a DTensor: the last ranks may have none
        chunk = -(-vocab // ranks)
        return min(vocab, rank * chunk), min(vocab, rank * chunk + chunk)
    cuts = {1: [], 2: [vocab // 5], 3: [1, vocab // 2], 4: [vocab // 3, vocab // 3, vocab - 1]}[ranks]
    cuts = [0, *(min(vocab, cut) for cut in cuts), vocab]
    return cuts[rank], cuts[rank + 1]


class OwnRows(torch.autograd.Function):
    """x [V, ...] -> this rank's rows of it. The gradients of all ranks' rows, put together, are x's on every rank."""

    @staticmethod
    def forward(ctx, x, begin, end):
        ctx.begin, ctx.end, ctx.shape = begin, end, x.shape
        return x[begin:end].clone()

    @staticmethod
    def backward(ctx, grad):
        whole = grad.new_zeros(ctx.shape, dtype=torch.float64)
        whole[ctx.begin : ctx.end] = grad
        dist.all_reduce(whole)
        return whole.to(grad.dtype), None, None


def own_rows(x, split):
    return None if x is None else OwnRows.apply(x, *bounds(x.shape[0], split))


def linear_logprobs(split, backend="auto"):
    """`parallel.linear_logprobs` that takes a whole head, as the checks of `testing` do."""

    def op(hidden, weight, targets, bias, **options):
        weight, bias = own_rows(weight, split), own_rows(bias, split)
        options = {"backend": backend, "group": dist.group.WORLD, **options}
        return parallel.linear_logprobs(hidden, weight, targets, bias, **options)

    return op


def linear_kl(split, backend="auto"):
    def op(hidden, weight, ref_hidden, ref_weight, mask, bias=None, ref_bias=None, **options):
        weight, bias, ref_weight, ref_bias = (own_rows(x, split) for x in (weight, bias, ref_weight, ref_bias))
        return parallel.linear_kl(
            hidden, weight, ref_hidden, ref_weight, mask, bias=bias, ref_bias=ref_bias, group=dist.group.WORLD,
            backend=backend, **options,
        )  # fmt: skip

    return op


def everywhere(x):
    """[ranks, ...] of every rank's x."""
    results = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(results, x.contiguous())
    return torch.stack(results)


def assert_same_bits(*tensors):
    for x in tensors:
        assert all(torch.equal(other, x) for other in everywhere(x.detach()))


def raised(error, function, *arguments, **options):
    """The message of `error`, which this rank must raise; then all ranks have raised what they had to."""
    message = None
    try:
        function(*arguments, **options)
    except error as caught:
        message = str(caught)
    assert message is not None, f"rank {dist.get_rank()} did not raise {error}"
    dist.barrier()
    return message


@functools.cache
def two_by_two():
    """The groups of this rank's row and of its column among four ranks, [[0, 1], [2, 3]]."""
    rows, columns = ([dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3))))
    return rows[dist.get_rank() // 2], columns[dist.get_rank() % 2]


def head(n, d, v, **options):
    return T.make_head(n, d, v, **{"bias": True, "masked": 0.25, **options})
