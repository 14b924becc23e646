"""From rewards to advantages, against the recursions and sums that the papers write down."""

import pytest
import torch

from rlhf_trainer.online.advantages import adapted_beta, equal_groups, gae, group_advantages, whiten


@pytest.fixture
def ragged():
    """rewards, values, mask [3, 6] of sequences of 6, 3 and 1 tokens; what is masked is NaN: it must not count."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64).masked_fill(~mask, torch.nan)
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_weighted_sum_of_td_errors(ragged, gamma, lam):
    rewards, values, mask = ragged
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, count in enumerate(mask.sum(1).tolist()):
        r, v = rewards[row, :count].tolist(), [*values[row, :count].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(count)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(count - t)) for t in range(count)]
        torch.testing.assert_close(advantages[row, :count], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(returns[row, :count], advantages[row, :count] + values[row, :count])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_at_lambda_1_returns_are_what_is_still_to_come(ragged):
    rewards, values, mask = ragged
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.nan_to_num(0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[mask], to_come[mask])


def test_with_perfect_values_there_is_no_advantage():
    rewards, mask = torch.tensor([[0.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, torch.full((1, 3), 2.0), mask, 1.0, 0.95)
    assert advantages.abs().max() == 0 and (returns == 2.0).all()


def test_whitening_is_over_what_counts(ragged):
    rewards, _, mask = ragged
    white = whiten(rewards, mask)
    assert white[mask].mean().abs() < 1e-12
    assert white[mask].var(correction=0) == pytest.approx(1, abs=1e-7)
    assert not white[~mask].any()
    kept = whiten(rewards, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(rewards[mask].mean().item())
    assert kept[mask].var(correction=0) == pytest.approx(1, abs=1e-7)


def test_whitening_of_nothing_or_of_equals_is_zero():
    assert not whiten(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool)).any()
    assert not whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).any()


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "cispo"])
def test_group_advantages_are_z_scores(loss_type):
    advantages = group_advantages(REWARDS, loss_type)
    expected = (REWARDS[0] - 1.0) / (2.0**0.5 + 1e-4)  # squares of 0, 1, 1, 2 over 3
    torch.testing.assert_close(advantages[0], expected)
    assert not advantages[1].any()


def test_other_baselines():
    torch.testing.assert_close(group_advantages(REWARDS, "dr_grpo")[0], torch.tensor([0.0, -1.0, -1.0, 2.0]))
    others = torch.tensor([1.0 - 1.0, 0.0 - 4 / 3, 0.0 - 4 / 3, 3.0 - 1 / 3])
    torch.testing.assert_close(group_advantages(REWARDS, "rloo")[0], others)
    torch.testing.assert_close(group_advantages(REWARDS, "reinforce"), REWARDS - 1.5)


def test_groups_that_teach_nothing_are_known():
    assert equal_groups(REWARDS).tolist() == [False, True]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "sapo"])
def test_equal_rewards_have_no_advantage_however_their_mean_is_rounded(loss_type):
    """Otherwise the optimizer, which takes out a gradient's scale, would make a whole step of the rounding."""
    rewards = torch.full((1, 8), 0.7)
    assert rewards.mean() != rewards[0, 0]
    assert not group_advantages(rewards, loss_type).any()


def test_beta_follows_the_kl():
    assert adapted_beta(0.1, 6.0, 6.0, 0.1) == 0.1
    assert adapted_beta(0.1, 6.6, 6.0, 0.1) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_beta(0.1, 600.0, 6.0, 0.1) == pytest.approx(0.102)  # the error is clipped to 0.2
    assert adapted_beta(0.1, 0.0, 6.0, 0.1) == pytest.approx(0.098)
