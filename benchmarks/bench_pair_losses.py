"""dpo_loss, bradley_terry_loss and kl_penalty on log-probs and rewards that are there already: [S]-sized tensors."""

import pytest

from benchmarks.harness.pair_losses import WAYS, PairLossJob

MOST_ROUNDS = 101  # a call takes a tenth of a millisecond, and now and then several times that


@pytest.mark.parametrize("s", [64, 4096, 262144])  # a batch of pairs, a batch of tokens, many
@pytest.mark.parametrize("op", WAYS)
def test_pair_losses(measure, op, s):
    measure(PairLossJob(op, s), section="pair_losses", most_rounds=MOST_ROUNDS)
