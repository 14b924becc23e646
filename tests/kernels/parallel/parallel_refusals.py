"""Cases of test_parallel.py about what is refused: on every rank alike, and before any is left waiting."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rlhf_kernels import parallel
from tests.kernels.parallel import parallel_ranks as R


def wrong_use_raises_on_every_rank():
    """Nobody is left waiting: what one rank refuses, or what differs between ranks, all hear of."""
    rank, ranks, world = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    h = R.head(6, 8, 40, masked=0.0)
    weight = R.own_rows(h.weight, "even")
    call = parallel.linear_logprobs
    for wrong in (40, -1):
        targets = torch.tensor([1, 2, wrong, 3, 4, 5])
        for own in (weight, distribute_tensor(h.weight, init_device_mesh("cpu", (ranks,)), [Shard(0)])):
            message = R.raised(IndexError, call, h.hidden, own, targets, group=None if own is not weight else world)
            assert f"target {wrong} is outside [0, 40)" in message
    assert "pass the group" in R.raised(ValueError, call, h.hidden, weight, h.targets)
    assert "share D" in R.raised(ValueError, call, h.hidden[:, :5], weight, h.targets, group=world)
    assert "outputs must be" in R.raised(ValueError, call, h.hidden, weight, h.targets, group=world, outputs=("x",))
    R.raised(TypeError, call, h.hidden, weight, h.targets.int(), group=world)
    assert "no rows" in R.raised(ValueError, call, h.hidden, weight[:0], h.targets, group=world)
    if ranks == 1:
        return
    last = rank == ranks - 1
    short = weight[:, :5] if last else weight
    message = R.raised(ValueError, call, h.hidden, short, h.targets, group=world)
    assert ("share D" if last else f"rank {ranks - 1} of the group failed") in message
    other = h.targets.flip(0) if last else h.targets
    assert "targets" in R.raised(ValueError, call, h.hidden, weight, other, group=world)
    needs = h.hidden.clone().requires_grad_(last)
    assert "whether hidden requires a gradient" in R.raised(ValueError, call, needs, weight, h.targets, group=world)
    hot = 2.0 if last else 1.0
    message = R.raised(ValueError, call, h.hidden, weight, h.targets, group=world, temperature=hot)
    assert "temperature" in message
    ref = R.own_rows(h.weight, "uneven")
    if ref.shape != weight.shape:
        message = R.raised(ValueError, parallel.linear_kl, h.hidden, weight, h.hidden, ref, group=world)
        assert "share a vocabulary and its shards" in message
    mask = torch.arange(6) > (3 if last else 2)
    message = R.raised(ValueError, parallel.linear_kl, h.hidden, weight, h.hidden, weight, mask, group=world)
    assert "mask" in message


def replicas_that_nearly_agree():
    """Differences that a sum of elements times places, a bias of one rank or 2 bytes of either dtype would hide: some
    would give numbers, and others collectives of unlike sizes."""
    last, world = dist.get_rank() == dist.get_world_size() - 1, dist.group.WORLD
    h = R.head(3, 8, 40, masked=0.0)
    weight, bias = (R.own_rows(x, "even") for x in (h.weight, h.bias))
    call, kl = parallel.linear_logprobs, parallel.linear_kl

    def refused(function, *arguments, **options):
        return R.raised(ValueError, function, *arguments, group=world, **options)

    targets = torch.tensor([7, 6, 2] if last else [5, 7, 2])
    assert "targets (a fingerprint)" in refused(call, h.hidden, weight, targets)
    targets = torch.tensor([-100, -100, 2] if last else [-100, 5, 2])
    assert "the number of targets that count" in refused(call, h.hidden, weight, targets)
    mask = torch.tensor([False, False, True] if last else [True, True, False])
    assert "the number of rows that mask counts" in refused(kl, h.hidden, weight, h.hidden, weight, mask)
    mask = torch.tensor([True, False, True, False] if last else [False, True, False, True])
    rows = torch.cat([h.hidden, h.hidden[:1]])
    assert "mask (a fingerprint)" in refused(kl, rows, weight, rows, weight, mask)

    own = bias if last else None
    assert "whether there is a bias" in refused(call, h.hidden, weight, h.targets, own)
    for options in ({"bias": own}, {"ref_bias": own}, {"bias": own, "ref_bias": None if last else bias}):
        assert "which biases there are" in refused(kl, h.hidden, weight, h.hidden, weight, **options)

    half = torch.float16 if last else torch.bfloat16
    low = (h.hidden.to(half), weight.to(half))
    assert "the GEMM's dtype" in refused(call, *low, h.targets)
    assert "the GEMMs' dtypes" in refused(kl, *low, h.hidden, weight)
    assert "the GEMMs' dtypes" in refused(kl, h.hidden, weight, *low)


def second_derivatives_are_refused():
    """A penalty on the gradient would be without effect, silently: a constant upstream hides it from autograd."""
    h = R.head(6, 8, 40, masked=0.0)
    for backend in R.BACKENDS:
        hidden = h.hidden.clone().requires_grad_()
        results = R.linear_logprobs("even", backend)(hidden, h.weight, h.targets, None)
        kl = R.linear_kl("even", backend)(hidden, h.weight, h.hidden.flip(0), h.weight, None)
        for x, name in ((results.logprobs, "linear_logprobs"), (kl, "linear_kl")):
            options = {"create_graph": True, "retain_graph": True}
            message = R.raised(RuntimeError, torch.autograd.grad, x.sum(), hidden, **options)
            assert f"parallel.{name} is differentiable once" in message
            once, again = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(once, again) and not once.requires_grad and once.norm() > 0.01


def placements_that_are_refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    h = R.head(6, 8, 40, masked=0.0)
    for placement in (Replicate(), Shard(1)):
        weight = distribute_tensor(h.weight, mesh, [placement])
        assert "sharded on dim 0" in R.raised(ValueError, parallel.linear_logprobs, h.hidden, weight, h.targets)
    weight = distribute_tensor(h.weight, mesh, [Shard(0)])
    hidden = distribute_tensor(h.hidden, mesh, [Replicate()])
    assert "to_local()" in R.raised(ValueError, parallel.linear_logprobs, hidden, weight, h.targets)
    bias = distribute_tensor(h.bias, mesh, [Replicate()])
    assert "bias must be" in R.raised(ValueError, parallel.linear_logprobs, h.hidden, weight, h.targets, bias)
    if dist.get_world_size() > 1:
        back = DeviceMesh("cpu", list(reversed(range(dist.get_world_size()))))
        weight = distribute_tensor(h.weight, back, [Shard(0)])
        assert "rising order" in R.raised(ValueError, parallel.linear_logprobs, h.hidden, weight, h.targets)


CASES = {
    case.__name__: case
    for case in (
        wrong_use_raises_on_every_rank,
        replicas_that_nearly_agree,
        second_derivatives_are_refused,
        placements_that_are_refused,
    )
}
