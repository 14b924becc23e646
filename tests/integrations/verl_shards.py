"""Run by torchrun: verl's function over a head whose rows are split over the ranks, as Megatron calls it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_kernels.integrations.verl import linear_cross_entropy
from tests.support.leaving import leave


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    T, D, rows = 11, 16, 24  # rows of each rank
    hidden = torch.randn(T, 1, D)  # Megatron's order, beside labels [1, T]
    weight, labels = torch.randn(ranks * rows, D), torch.randint(ranks * rows, (1, T))
    upstream = torch.randn(2, T)

    def run(hidden, weight, *group):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        results = torch.stack(linear_cross_entropy(hidden, weight, labels, 0.7, "none", *group))
        (results * upstream).sum().backward()
        return results.detach(), hidden.grad, weight.grad

    mine = slice(rank * rows, (rank + 1) * rows)
    whole, sharded = run(hidden, weight), run(hidden, weight[mine], dist.group.WORLD)
    torch.testing.assert_close(sharded[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sharded[2], whole[2][mine], rtol=1e-5, atol=1e-5)
    assert whole[1].norm() > 0.1
    dist.all_reduce(sharded[1])  # what the backward of Megatron's gather does, in its sequence parallelism
    torch.testing.assert_close(sharded[1], whole[1], rtol=1e-5, atol=1e-5)

    head = distribute_tensor(weight, dist.init_device_mesh("cpu", (ranks,)), [Shard(0)])
    with pytest.raises(ValueError, match="weight is a DTensor, a head that FSDP2 shards"):
        linear_cross_entropy(hidden, head, labels)
    print(f"rank {rank} of {ranks}: as the whole head")
    leave()


if __name__ == "__main__":
    main()
