"""Cases of test_parallel.py about sums by sequence: over split heads, split sequences, and both."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import rlhf_kernels as rk
from rlhf_kernels import parallel
from rlhf_kernels import testing as T
from rlhf_kernels.logprob import next_token_targets
from tests.kernels.parallel import parallel_ranks as R

SEQUENCES, LENGTH, WIDTH, VOCAB = 4, 9, 8, 37
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Batch:
    """hidden [S, T, D], labels [S, T] (the last sequence all masked), a head, and a reference of another width."""

    def __init__(self, dtype=torch.float32):
        policy = T.make_head(SEQUENCES * LENGTH, WIDTH, VOCAB, bias=True, masked=0.3, dtype=dtype)
        ref = T.make_head(SEQUENCES * LENGTH, WIDTH + 2, VOCAB, seed=50, dtype=dtype)
        self.hidden = policy.hidden.view(SEQUENCES, LENGTH, WIDTH)
        self.labels = policy.targets.view(SEQUENCES, LENGTH).clone()
        self.labels[-1] = -100
        self.weight, self.bias = policy.weight, policy.bias
        self.ref_hidden, self.ref_weight = ref.hidden.view(SEQUENCES, LENGTH, WIDTH + 2), ref.weight

    def positions(self, rank, ranks):
        """A part of each sequence, of unequal lengths, as (first, end)."""
        cuts = [0, *(LENGTH * i // ranks + (i % 2) for i in range(1, ranks)), LENGTH]
        return cuts[rank], cuts[rank + 1]


def check(split, whole, leaves, own):
    """`split(*own leaves)` has the values of `whole(*leaves)`, and its gradients are those of the whole that `own`
    picks. The upstream is of varied sizes."""
    mine = T.leaves_of([pick(leaf) for pick, leaf in zip(own, leaves, strict=True)])
    leaves = T.leaves_of(leaves)
    got, want = split(*mine), whole(*leaves)
    torch.testing.assert_close(got, want, **CLOSE)
    R.assert_same_bits(got)
    upstream = T.randn(*want.shape, seed=9, dtype=want.dtype) if want.dim() else torch.ones_like(want)
    results, truth = (torch.autograd.grad(x, of, upstream) for x, of in ((got, mine), (want, leaves)))
    for pick, gradient, exact in zip(own, results, truth, strict=True):
        torch.testing.assert_close(gradient, pick(exact), **CLOSE)
        assert exact.norm() > 0.01


def sums(function, labels, **options):
    return lambda hidden, weight, bias=None: function(hidden, weight, labels, bias, **options).logprobs


def loss(function, labels, **options):
    return lambda hidden, weight, bias=None: function(hidden, weight, labels, bias=bias, **options).loss


def same(x):
    return x


def rows(x):
    return x[slice(*R.bounds(x.shape[0], "uneven"))]


def sequences_over_a_split_head():
    b, world = Batch(), dist.group.WORLD
    for options in ({}, {"average": True}, {"shift": False, "temperature": 0.7}):
        split = sums(parallel.sequence_logprobs, b.labels, group=world, **options)
        whole = sums(rk.sequence_logprobs, b.labels, **options)
        check(split, whole, (b.hidden, b.weight, b.bias), (same, rows, rows))
    counts = parallel.sequence_logprobs(b.hidden, rows(b.weight), b.labels, group=world).token_counts
    assert torch.equal(counts, (b.labels[:, 1:] != -100).sum(-1))


def packed_sequences_over_a_split_head():
    b, world = Batch(), dist.group.WORLD
    packed = {"cu_seqlens": torch.arange(SEQUENCES + 1) * LENGTH, "group": world}
    labels, zeros = b.labels.flatten(), torch.zeros(SEQUENCES)
    for split, whole in (
        (sums(parallel.sequence_logprobs, labels, **packed), sums(rk.sequence_logprobs, b.labels)),
        (
            loss(parallel.linear_dpo_loss, labels, ref_logps=zeros, **packed),
            loss(rk.linear_dpo_loss, b.labels, ref_logps=zeros),
        ),
    ):
        check(lambda h, w, f=split: f(h.flatten(0, 1), w), whole, (b.hidden, b.weight), (same, rows))


def split_sequences():
    """Sums and counts are of whole sequences; a rank's gradient is that of its positions, once; the head's adds up."""
    b, world = Batch(), dist.group.WORLD
    at = slice(*b.positions(dist.get_rank(), dist.get_world_size()))
    targets = next_token_targets(b.labels)[:, at]
    options = {"sequence_group": world, "shift": False}
    for average in (False, True):
        split = sums(parallel.sequence_logprobs, targets, average=average, **options)
        whole = sums(rk.sequence_logprobs, b.labels, average=average)
        check(
            lambda h, f=split: f(h, b.weight, b.bias), lambda h, f=whole: f(h, b.weight, b.bias), (b.hidden,),
            (lambda x: x[:, at],),
        )  # fmt: skip
    counts = parallel.sequence_logprobs(b.hidden[:, at], b.weight, targets, **options).token_counts
    assert torch.equal(counts, (b.labels[:, 1:] != -100).sum(-1))
    packed = parallel.sequence_logprobs(
        b.hidden[:, at].flatten(0, 1), b.weight, targets.flatten(), b.bias, sequence_group=world, shift=False,
        cu_seqlens=torch.arange(SEQUENCES + 1) * targets.shape[1],
    )  # fmt: skip
    whole = rk.sequence_logprobs(b.hidden, b.weight, b.labels, b.bias)
    torch.testing.assert_close(packed.logprobs, whole.logprobs, **CLOSE)
    leaf = b.weight.clone().requires_grad_()
    parallel.sequence_logprobs(
        b.hidden[:, at], leaf, targets, b.bias, sequence_group=world, shift=False
    ).logprobs.sum().backward()
    one = b.weight.clone().requires_grad_()
    rk.sequence_logprobs(b.hidden, one, b.labels, b.bias).logprobs.sum().backward()
    torch.testing.assert_close(R.everywhere(leaf.grad).sum(0), one.grad, **CLOSE)


def preference_losses_over_a_split_head():
    """Reference log-probs given or computed, from a head that is split at other rows; length-normalised types."""
    b, world = Batch(), dist.group.WORLD
    halves = slice(*R.bounds(VOCAB, "even"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds = (
        {"loss_type": "sigmoid", "ref_hidden": b.ref_hidden},
        {"loss_type": "ipo_mean", "ref_hidden": b.ref_hidden, "label_smoothing": 0.0},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "hinge", "ref_logps": torch.tensor([-1.0, -2.0, -3.0, 0.0])},
    )
    for kind in kinds:
        own = {"ref_weight": b.ref_weight[halves]} if "ref_hidden" in kind else {}
        whole = {"ref_weight": b.ref_weight} if "ref_hidden" in kind else {}
        split = loss(parallel.linear_dpo_loss, b.labels, group=world, **kind, **own)
        check(
            split, loss(rk.linear_dpo_loss, b.labels, **kind, **whole), (b.hidden, b.weight, b.bias), (same, rows, rows)
        )
        want = rk.linear_dpo_loss(b.hidden, b.weight, b.labels, bias=b.bias, **kind, **whole)
        if own:
            own = {"ref_weight": distribute_tensor(b.ref_weight, mesh, [Shard(0)])}
        weight = distribute_tensor(b.weight, mesh, [Shard(0)])
        bias = distribute_tensor(b.bias, mesh, [Shard(0)])
        got = parallel.linear_dpo_loss(b.hidden, weight, b.labels, bias=bias, **kind, **own)
        for results, exact in zip(got, want, strict=True):
            assert (results is None) == (exact is None)
            if results is not None:
                torch.testing.assert_close(results, exact, **CLOSE)


def preference_losses_over_split_sequences():
    b, world = Batch(), dist.group.WORLD
    at = slice(*b.positions(dist.get_rank(), dist.get_world_size()))
    targets = next_token_targets(b.labels)[:, at]
    check(
        lambda h: parallel.linear_dpo_loss(
            h, b.weight, targets, ref_hidden=b.ref_hidden[:, at], ref_weight=b.ref_weight, loss_type="ipo_mean",
            sequence_group=world, shift=False,
        ).loss,
        lambda h: rk.linear_dpo_loss(
            h, b.weight, b.labels, ref_hidden=b.ref_hidden, ref_weight=b.ref_weight, loss_type="ipo_mean"
        ).loss,
        (b.hidden,), (lambda x: x[:, at],),
    )  # fmt: skip


def split_heads_and_split_sequences():
    """Four ranks: two hold halves of the head, and each of them halves of the sequences."""
    if dist.get_world_size() != 4:
        return
    b = Batch()
    group, sequence_group = R.two_by_two()
    at = slice(*b.positions(dist.get_rank() // 2, 2))
    half = slice(0, 20) if dist.get_rank() % 2 == 0 else slice(20, None)
    targets = next_token_targets(b.labels)[:, at]
    weight, hidden = (x.clone().requires_grad_() for x in (b.weight[half], b.hidden[:, at]))
    leaves = T.leaves_of((b.hidden, b.weight))
    got = parallel.linear_dpo_loss(
        hidden, weight, targets, torch.zeros(SEQUENCES), group=group, sequence_group=sequence_group, shift=False
    )
    want = rk.linear_dpo_loss(leaves[0], leaves[1], b.labels, torch.zeros(SEQUENCES))
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    R.assert_same_bits(got.loss)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(hidden.grad, leaves[0].grad[:, at], **CLOSE)
    dist.all_reduce(weight.grad, group=sequence_group)
    torch.testing.assert_close(weight.grad, leaves[1].grad[half], **CLOSE)


def doubles():
    """fp64 goes through the reference, to 1e-10."""
    b, world = Batch(torch.float64), dist.group.WORLD
    got = parallel.sequence_logprobs(b.hidden, rows(b.weight), b.labels, rows(b.bias), group=world).logprobs
    want = rk.sequence_logprobs(b.hidden, b.weight, b.labels, b.bias).logprobs
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def wrong_use_of_split_sequences():
    """A target that only one rank has raises there as what it is, and everywhere."""
    b, world, rank = Batch(), dist.group.WORLD, dist.get_rank()
    call = parallel.sequence_logprobs
    options = {"sequence_group": world, "shift": False}
    assert "pass shift=False" in R.raised(ValueError, call, b.hidden, b.weight, b.labels, sequence_group=world)
    message = R.raised(
        ValueError, call, b.hidden, b.weight, b.labels, position_ids=torch.zeros_like(b.labels), **options
    )
    assert "pass cu_seqlens" in message
    wrong = b.labels.clone()
    wrong[0, 0] = VOCAB if rank == 1 else 0
    message = R.raised(IndexError if rank == 1 else ValueError, call, b.hidden, b.weight, wrong, **options)
    assert ("outside [0, 37)" if rank == 1 else "rank 1 of the group failed") in message
    fewer = slice(None) if rank else slice(2)
    message = R.raised(ValueError, call, b.hidden[fewer], b.weight, b.labels[fewer], **options)
    assert "the number of sequences must be the same" in message
    call = parallel.linear_dpo_loss
    assert "shift=False" in R.raised(ValueError, call, b.hidden, b.weight, b.labels, sequence_group=world)
    assert "needs one reference" in R.raised(ValueError, call, b.hidden, b.weight, b.labels, group=world)
    assert "must be even" in R.raised(
        ValueError, call, b.hidden[:3], b.weight, b.labels[:3], torch.zeros(3), group=world
    )


CASES = {
    case.__name__: case
    for case in (
        sequences_over_a_split_head,
        packed_sequences_over_a_split_head,
        split_sequences,
        preference_losses_over_a_split_head,
        preference_losses_over_split_sequences,
        split_heads_and_split_sequences,
        doubles,
        wrong_use_of_split_sequences,
    )
}
