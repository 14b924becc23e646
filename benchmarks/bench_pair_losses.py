"""dpo_loss, bradley_terry_loss and kl_penalty on log-probs and rewards that are there already: [S]-sized tensors."""

import pytest

import rlhf_kernels as rk
from benchmarks.harness.pair_losses import WAYS, PairLoss

MOST_TURNS = 101  # a call takes a tenth of a millisecond, and now and then several times that


@pytest.mark.budget(turns=12)
@pytest.mark.parametrize("s", [64, 4096])  # a batch of pairs, a batch of tokens
@pytest.mark.parametrize("op", WAYS)
def test_pair_losses(measure, op, s):
    assert "native" in rk.available_backends()  # or "auto" would be another
    measure(PairLoss(op, s, backends=("native",)), section="pair_losses", most_turns=MOST_TURNS)
