"""The plan of batches: a seeded partition, independent of micro-batches, shared out without loss."""

import pytest

from rlhf_trainer.training.batch_plan import epoch_order, plan_batches, share_of_process, step_plan


def contents(plan):
    return [sorted(i for micro in batch for i in micro) for batch in plan]


def test_a_plan_partitions_the_pairs():
    plan = plan_batches([5] * 23, batch_size=8, micro_batch_size=3, seed=1)
    assert sorted(i for batch in contents(plan) for i in batch) == list(range(23))
    assert [[len(micro) for micro in batch] for batch in plan] == [[3, 3, 2], [3, 3, 2], [3, 3, 1]]


def test_contents_follow_from_seed_and_batch_size_alone():
    lengths = list(range(20))
    plan = plan_batches(lengths, 8, 8, seed=3)
    assert contents(plan) == contents(plan_batches(lengths[::-1], 8, 2, seed=3))
    assert contents(plan) != contents(plan_batches(lengths, 8, 8, seed=4))
    assert contents(plan_batches(lengths, 8, 8, seed=None)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


def test_like_lengths_share_a_micro_batch():
    (batch,) = plan_batches([9, 1, 8, 2], 4, 2, seed=0)
    assert batch == [[1, 3], [2, 0]]


def test_epochs_are_orders_of_the_same_batches():
    orders = [epoch_order(50, seed=0, epoch=e) for e in range(3)]
    assert orders[0] == list(range(50))
    assert all(sorted(order) == orders[0] for order in orders)
    assert orders[1] != orders[0] and orders[2] not in orders[:2]
    assert epoch_order(50, seed=0, epoch=1) == orders[1] != epoch_order(50, seed=1, epoch=1)


def test_max_steps_overrides_epochs():
    assert len(step_plan(4, epochs=2, max_steps=None, seed=0)) == 8
    assert len(step_plan(4, epochs=2, max_steps=3, seed=0)) == 3
    assert len(step_plan(4, epochs=1, max_steps=10, seed=0)) == 10
    assert step_plan(4, 3, None, 0)[:8] == step_plan(4, 2, None, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_sum_to_the_mean_of_the_batch(world):
    """Any values, any split: the weighted means of the micro-batches sum to the plain mean over all pairs."""
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    batch = [[4, 1], [0, 2], [6, 3], [5]]
    shares = [share_of_process(batch, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # equally many forward passes each, or DDP would hang
    mean = sum(s.weight * sum(values[i] for i in s.indices) / len(s.indices) for share in shares for s in share)
    assert mean == pytest.approx(sum(values) / len(values))
    counted = [i for share in shares for s in share if s.weight > 0 for i in s.indices]
    assert sorted(counted) == list(range(7))
