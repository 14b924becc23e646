"""Cases of test_parallel.py about `parallel.linear_logprobs`, and about what all functions share."""

import itertools
import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import rlhf_kernels as rk
from rlhf_kernels import _workspace, parallel
from rlhf_kernels import testing as T
from tests.kernels.parallel import parallel_kl, parallel_refusals, parallel_sequences
from tests.kernels.parallel import parallel_ranks as R

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def backends_of(dtype):
    return ("reference",) if dtype == torch.float64 else R.BACKENDS


def every_output_and_gradient():
    """Against the fp64 truth, to twice eager's error; fp64 to 1e-12. 2 tokens for up to 4 ranks; several tiles."""
    for v, split, dtype in itertools.product((2, 1031), R.SPLITS, DTYPES):
        for backend in backends_of(dtype):
            op = R.linear_logprobs(split, backend)
            T.check_linear_logprobs(op, R.head(33, 16, v, dtype=dtype))
            T.check_linear_logprobs(op, R.head(20, 17, v, dtype=dtype, bias=False), **R.OPTIONS)


def logits_of_every_kind():
    """Below -88, around 1e4, nearly one-hot: maxima and sums of shards differ by any factor."""
    for logits, dtype in itertools.product(T.LOGITS, DTYPES):
        for backend in backends_of(dtype):
            inputs = R.head(40, 16, 257, logits=logits, dtype=dtype)
            T.check_linear_logprobs(R.linear_logprobs("uneven", backend), inputs)


def each_output_alone():
    for name, backend in itertools.product(T.OUTPUTS, R.BACKENDS):
        T.check_linear_logprobs(R.linear_logprobs("even", backend), R.head(20, 16, 67), outputs=(name,))
    for name in T.DIFFERENTIABLE:
        T.check_linear_logprobs(R.linear_logprobs("even"), R.head(20, 16, 67), upstream=(name,))


def ignore_index_that_is_a_token():
    """In one shard 3 is an id of its own that must not be taken for the ignored one."""
    for backend in R.BACKENDS:
        T.check_linear_logprobs(R.linear_logprobs("even", backend), R.head(64, 8, 17, ignore_index=3), ignore_index=3)


def mixed_dtypes():
    inputs = R.head(33, 16, 67, dtype=torch.bfloat16, weight_dtype=torch.float32)
    for backend in R.BACKENDS:
        T.check_linear_logprobs(R.linear_logprobs("uneven", backend), inputs)


def autocast():
    def op(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return R.linear_logprobs("uneven")(*arguments, **options)

    T.check_linear_logprobs(op, R.head(33, 16, 67), autocast=torch.bfloat16)
    ref = T.make_kl_inputs(20, 8, 67, kl=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        kl = R.linear_kl("uneven")(*ref)
    low = (ref.hidden.bfloat16(), ref.weight.bfloat16(), ref.ref_hidden.bfloat16(), ref.ref_weight.bfloat16())
    torch.testing.assert_close(kl, rk.linear_kl(*low), rtol=1e-5, atol=1e-7)


def the_gradient_of_hidden_is_rounded_once():
    """A bf16 gradient that each shard had rounded would be off by more than storing the truth costs."""
    h = R.head(64, 32, 257, dtype=torch.bfloat16, masked=0.0)

    def gradient(hidden):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # with fp32 leaves nothing but the operands is rounded
            results = R.linear_logprobs("even")(leaf, h.weight, h.targets, h.bias)
        return torch.autograd.grad(results.logprobs.sum(), leaf)[0]

    unrounded = gradient(h.hidden.float())
    assert unrounded.dtype == torch.float32
    assert torch.equal(gradient(h.hidden), unrounded.bfloat16())


def kept_and_recomputed_logits():
    """Kept logits serve a backward with the whole vocabulary's statistics just as recomputed ones do."""
    before, calls = _workspace.logits_to_keep, []

    def keep(*arguments):
        calls.append(before(*arguments))
        return calls[-1]

    grads = []
    for choice in (keep, lambda *arguments: 0):
        _workspace.logits_to_keep = choice
        h = R.head(40, 16, 257, masked=0.25)
        leaves = T.leaves_of((h.hidden, h.weight, h.bias))
        results = R.linear_logprobs("even", "native")(leaves[0], leaves[1], h.targets, leaves[2], outputs=("entropy",))
        grads.append(torch.autograd.grad((results.logprobs + results.entropy).sum(), leaves))
    _workspace.logits_to_keep = before
    assert calls and min(calls) > 0
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-6)


def frozen_heads():
    """Two products in all: of a head that is not trained each shard finds its part of d logprob / d hidden forward."""
    limits = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}
    for split, dtype, v, options in itertools.product(R.SPLITS, DTYPES, (2, 1031), ({}, R.OPTIONS)):
        for backend in backends_of(dtype):
            h = R.head(33, 16, v, dtype=dtype)
            gradient = gradient_of_frozen(h, split, backend, options)
            exact = h._replace(**{name: getattr(h, name).double() for name in ("hidden", "weight", "bias")})
            leaf = exact.hidden.requires_grad_()
            truth = rk.linear_logprobs(leaf, exact.weight, h.targets, exact.bias, backend="reference", **options)
            (expected,) = torch.autograd.grad((truth.logprobs * T.randn(33)).sum(), leaf)
            error = T.relative_error(gradient, expected)
            assert error < limits[dtype], (split, dtype, v, options, backend, error)


def gradient_of_frozen(h, split, backend, options, output="logprobs"):
    leaf, group = h.hidden.clone().requires_grad_(), dist.group.WORLD
    weight, bias = (R.own_rows(x, split).detach() for x in (h.weight, h.bias))
    results = parallel.linear_logprobs(
        leaf, weight, h.targets, bias, group=group, backend=backend, outputs=("entropy",), **options
    )
    loss = (results.logprobs * T.randn(len(leaf))).sum()
    return torch.autograd.grad(loss if output == "logprobs" else loss + getattr(results, output).sum(), leaf)[0]


def frozen_heads_near_certainty():
    """Of targets whose probability is all but 1, wherever they are: 1 - p_y is the others' mass, over all shards."""
    weight = T.randn(300, 8) * 0.1
    weight[7, 0], weight[290, 1] = 20.0, 27.0
    h = T.Head(torch.eye(2, 8), weight, torch.tensor([7, 290]), torch.zeros(300))
    leaf = h.hidden.double().requires_grad_()
    z = leaf @ weight.double().T
    rest = torch.ones_like(z, dtype=torch.bool).scatter(1, h.targets[:, None], False)
    others = z[rest].view(2, -1) - z.gather(1, h.targets[:, None])
    (expected,) = torch.autograd.grad((-torch.log1p(others.exp().sum(1)) * T.randn(2)).sum(), leaf)
    for split, backend in itertools.product(R.SPLITS, (name for name in R.BACKENDS if name != "reference")):
        gradient = gradient_of_frozen(h, split, backend, {})
        for row in range(2):
            error = T.relative_error(gradient[row], expected[row])
            assert error < 2e-6, (split, backend, row, error)


def frozen_heads_with_other_gradients():
    for split, backend, output in itertools.product(R.SPLITS, R.BACKENDS, ("logsumexp", "entropy")):
        h = R.head(20, 8, 40)
        gradient = gradient_of_frozen(h, split, backend, R.OPTIONS, output)
        leaf = h.hidden.clone().requires_grad_()
        whole = rk.linear_logprobs(leaf, h.weight, h.targets, h.bias, outputs=("entropy",), **R.OPTIONS)
        loss = (whole.logprobs * T.randn(20)).sum() + getattr(whole, output).sum()
        assert T.relative_error(gradient, torch.autograd.grad(loss, leaf)[0]) < 3e-6


def frozen_shards_that_allow_no_token():
    for split, backend in itertools.product(R.SPLITS, R.BACKENDS):
        h = R.head(33, 8, 41, masked=0.0)
        h = h._replace(targets=h.targets % 20, bias=torch.where(torch.arange(41) < 20, h.bias, -torch.inf))
        leaf = h.hidden.clone().requires_grad_()
        whole = rk.linear_logprobs(leaf, h.weight, h.targets, h.bias, backend=backend)
        (expected,) = torch.autograd.grad((whole.logprobs * T.randn(33)).sum(), leaf)
        assert T.relative_error(gradient_of_frozen(h, split, backend, {}), expected) < 3e-6


def products_of_a_frozen_head_are_two():
    from rlhf_kernels import _extension

    count, h = _extension.module().multiply_adds, T.make_head(128, 64, 4096, bias=True)
    before = count()
    gradient_of_frozen(h, "even", "native", {})
    assert count() - before == 2 * 128 * 64 * 4096 // dist.get_world_size()


def ignored_rows_of_nan():
    """Neither hidden states, nor upstream gradients, nor a mask's complement are read."""
    for backend in R.BACKENDS:
        h = R.head(16, 8, 37, masked=0.5)
        ignored = h.targets == -100
        hidden = h.hidden.clone()
        hidden[ignored] = torch.nan
        leaves = T.leaves_of((hidden, h.weight))
        results = R.linear_logprobs("even", backend)(leaves[0], leaves[1], h.targets, None, outputs=T.OUTPUTS)
        assert all((x[ignored] == 0).all() for x in results)
        upstream = torch.ones(16).masked_fill(ignored, torch.nan)
        grads = torch.autograd.grad(results.logprobs, leaves, upstream)
        assert (grads[0][ignored] == 0).all() and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        kl = R.linear_kl("even", backend)(leaves[0], leaves[1], h.hidden.flip(0), h.weight, ~ignored)
        grads = torch.autograd.grad(kl, leaves, upstream)
        assert (kl[ignored] == 0).all() and (grads[0][ignored] == 0).all()
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def no_rows():
    for targets in (torch.full((5,), -100), torch.empty(0, dtype=torch.int64)):
        leaves = T.leaves_of((torch.randn(len(targets), 8), T.make_head(1, 8, 37).weight))
        results = R.linear_logprobs("uneven")(leaves[0], leaves[1], targets, None, outputs=T.OUTPUTS)
        grads = torch.autograd.grad(results.logprobs.sum(), leaves)
        assert all((x == 0).all() for x in (*results, *grads)) and results.logprobs.shape == targets.shape


def top1_ties_across_shards():
    """Only the first of equal maxima is top 1: inside a shard, in another one, and behind an empty shard."""
    v = 40
    for backend in R.BACKENDS:
        weight = torch.zeros(v, 4)
        weight[[3, 4, 17, 31, 39], 0] = 1.0  # the same largest logit
        hidden = torch.zeros(v, 4)
        hidden[:, 0] = 2.0
        targets = torch.arange(v)
        for split in R.SPLITS:
            results = R.linear_logprobs(split, backend)(hidden, weight, targets, None, outputs=("is_top1",)).is_top1
            assert results.nonzero().flatten().tolist() == [3]
            results = R.linear_logprobs(split, backend)(-hidden, weight, targets, None, outputs=("is_top1",)).is_top1
            assert results.nonzero().flatten().tolist() == [0]


def a_shard_that_allows_no_token():
    """Padded vocabularies are often masked with a bias of -inf: whole shards of it."""
    for split, backend in itertools.product(R.SPLITS, R.BACKENDS):
        h = R.head(33, 8, 41, masked=0.0)
        bias = h.bias.clone()
        begin = 41 // 2
        bias[begin:] = -torch.inf
        inside = h._replace(targets=h.targets % begin, bias=bias)
        T.check_linear_logprobs(
            R.linear_logprobs(split, backend), inside, outputs=("entropy", "is_top1", "log_sum_sq_probs")
        )
        outside = R.linear_logprobs(split, backend)(h.hidden, h.weight, torch.full_like(h.targets, 40), bias)
        assert outside.logprobs.isneginf().all() and outside.logsumexp.isfinite().all()


def shards_of_hugely_different_range():
    """One shard's logits are 1e4 below another's: its terms vanish, and nothing overflows or is 0 * inf."""
    h = R.head(20, 8, 40, masked=0.0)
    bias = torch.where(torch.arange(40) < 20, -1e4, 0.0)
    for backend in R.BACKENDS:
        for flipped in (bias, bias.flip(0)):
            T.check_linear_logprobs(R.linear_logprobs("even", backend), h._replace(bias=flipped))


def batch_invariant():
    """A row's bits do not depend on which rows came along: ranks merge in one order, not in a ring's."""
    h = R.head(40, 32, 1031, masked=0.0)
    op = R.linear_logprobs("uneven", "native")
    together = op(*h, outputs=T.OUTPUTS)
    for rows in (slice(3, 4), slice(7, 40), slice(None, None, 3)):
        apart = op(h.hidden[rows], h.weight, h.targets[rows], h.bias, outputs=T.OUTPUTS)
        assert all(torch.equal(a, b[rows]) for a, b in zip(apart, together, strict=True))


def same_bits_on_every_rank():
    for dtype, backend in itertools.product((torch.float32, torch.bfloat16), R.BACKENDS):
        h = R.head(50, 16, 257, dtype=dtype)
        hidden = h.hidden.clone().requires_grad_()
        results = R.linear_logprobs("uneven", backend)(hidden, h.weight, h.targets, h.bias, outputs=T.OUTPUTS)
        loss = results.logprobs.sum() + results.entropy.sum()
        R.assert_same_bits(*results, *torch.autograd.grad(loss, hidden))
        kl = R.linear_kl("uneven", backend)(hidden, h.weight, h.hidden.flip(0), h.weight, None)
        R.assert_same_bits(kl, *torch.autograd.grad(kl.sum(), hidden))


def dtensor_heads():
    """Sharded evenly, with a last shard that is smaller or empty; gradients come back as DTensors of the same kind."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for v in (1, 2, 5, 37, 64):
        h = R.head(20, 8, v)
        leaves = T.leaves_of((h.hidden, h.weight, h.bias))
        weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (h.weight, h.bias))
        hidden = h.hidden.clone().requires_grad_()
        want = rk.linear_logprobs(leaves[0], leaves[1], h.targets, leaves[2], outputs=("entropy",))
        got = parallel.linear_logprobs(hidden, weight, h.targets, bias, outputs=("entropy",))
        kl = parallel.linear_kl(hidden, weight, h.hidden.flip(0), weight, bias=bias)
        want_kl = rk.linear_kl(leaves[0], leaves[1], h.hidden.flip(0), h.weight, bias=leaves[2])
        for a, b in ((got.logprobs, want.logprobs), (got.entropy, want.entropy), (kl, want_kl)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        (got.logprobs.sum() + got.entropy.sum() + kl.sum()).backward()
        (want.logprobs.sum() + want.entropy.sum() + want_kl.sum()).backward()
        torch.testing.assert_close(hidden.grad, leaves[0].grad, rtol=1e-4, atol=1e-5)
        for parameter, leaf in ((weight, leaves[1]), (bias, leaves[2])):
            assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
            torch.testing.assert_close(parameter.grad.full_tensor(), leaf.grad, rtol=1e-4, atol=1e-5)


def collectives_are_counted():
    """Forward one all-gather (and one of a few integers where the ranks must tell their sizes), backward one sum."""
    calls = []
    real = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
    for name, function in real.items():

        def counted(*arguments, name=name, function=function, **options):
            tensor = arguments[1] if name == "all_gather" else arguments[0]
            calls.append((name, tensor.dtype, tuple(tensor.shape)))
            return function(*arguments, **options)

        setattr(dist, name, counted)
    h = R.head(20, 8, 64, masked=0.25)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(h.weight, mesh, [Shard(0)])
    real["all_reduce"](torch.zeros(1))  # whatever mesh and DTensor send first
    hidden = h.hidden.clone().requires_grad_()
    for inputs, group, headers in ((weight, None, 0), (weight.to_local(), dist.group.WORLD, 1)):
        options = {} if group is None else {"group": group}
        calls.clear()
        loss = parallel.linear_logprobs(hidden, inputs, h.targets, outputs=("entropy",), **options).logprobs.sum()
        assert calls[headers:] == [("all_gather", torch.float32, (4, 15))]
        assert [name for name, *_ in calls[:headers]] == ["all_gather"] * headers
        calls.clear()
        loss.backward()
        assert calls == [("all_reduce", torch.float32, (15, 8))]
        calls.clear()
        kl = parallel.linear_kl(hidden, inputs, h.hidden, inputs, h.targets >= 0, **options)
        assert calls[headers:] == [("all_gather", torch.float32, (7, 15))] and len(calls) == 1 + headers
        calls.clear()
        kl.sum().backward()
        assert calls == [("all_reduce", torch.float32, (15, 8))]
        with torch.no_grad():
            frozen = T.leaves_of((h.weight,))[0]
        calls.clear()
        parallel.linear_logprobs(h.hidden, R.own_rows(frozen, "even"), h.targets, group=dist.group.WORLD)
        assert len(calls) == 2
    for name, function in real.items():
        setattr(dist, name, function)


def compiled_without_a_graph_break():
    """A DTensor head says its sizes, so that nothing is read back; targets that no rank has give NaN, not a hang."""
    h = R.head(16, 8, 33)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(h.weight, mesh, [Shard(0)]).requires_grad_()
    hidden = h.hidden.clone().requires_grad_()
    mask = h.targets >= 0

    def step(hidden, weight, targets):
        values = parallel.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
        kl = parallel.linear_kl(hidden, weight, h.hidden.flip(0), weight, mask)
        return values.logprobs, (values.logprobs + values.entropy + kl).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        logprobs, loss = function(hidden, weight, h.targets)
        grads = torch.autograd.grad(loss, (hidden, weight))
        results.append((logprobs, loss, grads[0], grads[1].full_tensor()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    for wrong in (-1, 33):
        values, _ = compiled(hidden, weight, torch.where(torch.arange(16) == 0, wrong, h.targets))
        assert values[0].isnan() and values[1:].isfinite().all()


CASES = {
    case.__name__: case
    for case in (
        every_output_and_gradient,
        logits_of_every_kind,
        each_output_alone,
        ignore_index_that_is_a_token,
        mixed_dtypes,
        autocast,
        the_gradient_of_hidden_is_rounded_once,
        kept_and_recomputed_logits,
        frozen_heads,
        frozen_heads_near_certainty,
        frozen_heads_with_other_gradients,
        frozen_shards_that_allow_no_token,
        products_of_a_frozen_head_are_two,
        ignored_rows_of_nan,
        no_rows,
        top1_ties_across_shards,
        a_shard_that_allows_no_token,
        shards_of_hugely_different_range,
        batch_invariant,
        same_bits_on_every_rank,
        dtensor_heads,
        collectives_are_counted,
        compiled_without_a_graph_break,
    )
} | {**parallel_kl.CASES, **parallel_refusals.CASES, **parallel_sequences.CASES}

if __name__ == "__main__":
    R.run(CASES, json.loads(sys.argv[2]), sys.argv[1])
