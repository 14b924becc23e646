"""dpo_loss, bradley_terry_loss and kl_penalty on log-probs and rewards that are there already: [S]-sized tensors."""

import pytest

import rlhf_kernels as rk
from benchmarks.harness.pair_losses import WAYS, PairLoss

MOST_TURNS = 101  # a call takes a tenth of a millisecond, and now and then several times that


@pytest.mark.budget(turns=10)
@pytest.mark.parametrize("op", WAYS)
def test_pair_losses(measure, op):
    assert "native" in rk.available_backends()  # or "auto" would be another
    measure(PairLoss(op, 4096, backends=("native",)), section="pair_losses", most_turns=MOST_TURNS)
