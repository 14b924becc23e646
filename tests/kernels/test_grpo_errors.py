"""grpo_loss and grpo_loss_weights: wrong use says what was expected and what came."""

import math

import pytest
import torch

import rlhf_kernels as rk

ZEROS, TRUE = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
LISTED = "grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"variant": "ppo"}, ValueError, f"variant must be one of {LISTED}; got 'ppo'"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs must be \[B, T\], got \(3,\)"),
        ({"logprobs": ZEROS.long()}, TypeError, "logprobs must be float32.*int64"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must be \(2, 3\) like logprobs, got \(2, 4\)"),
        ({"advantages": torch.zeros(2, 3)}, ValueError, r"advantages must be \[2\], got \(2, 3\)"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[2\], got \(3,\)"),
        ({"advantages": torch.zeros(2).long()}, TypeError, "advantages must be float32.*int64"),
        ({"advantages": torch.zeros(2, device="meta")}, ValueError, "one device.*advantages on meta"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got torch.float32"),
        ({"mask": TRUE[:, :2]}, ValueError, r"mask must be \(2, 3\) like logprobs, got \(2, 2\)"),
        ({"mask": TRUE.to("meta")}, ValueError, "one device.*mask on meta"),
        ({"ref_logprobs": torch.zeros(2), "beta": 0.1}, ValueError, r"ref_logprobs must be \(2, 3\).*got \(2,\)"),
        ({"ref_logprobs": ZEROS.long()}, TypeError, "ref_logprobs must be float32.*int64"),
        ({"kl": torch.zeros(()), "beta": 0.1}, ValueError, r"kl must be \(2, 3\) like logprobs, got \(\)"),
        ({"kl": ZEROS, "ref_logprobs": ZEROS}, ValueError, "ref_logprobs, for k3, or kl, but not both"),
        ({"beta": 0.1}, ValueError, "beta=0.1 needs ref_logprobs.*or kl"),
        ({"beta": -0.1, "kl": ZEROS}, ValueError, "beta must be finite and >= 0, got -0.1"),
        ({"beta": math.inf, "kl": ZEROS}, ValueError, "beta must be finite and >= 0, got inf"),
        ({"beta": math.nan, "kl": ZEROS}, ValueError, "beta must be finite and >= 0, got nan"),
        ({"clip_low": 1.5}, ValueError, r"clip_low must be in \[0, 1\].*got 1.5"),
        ({"clip_high": -1.0}, ValueError, "clip_high must be >= 0.*got -1.0"),
        ({"sampler_logprobs": ZEROS}, ValueError, "sampler_logprobs and is_cap go together"),
        ({"is_cap": 2.0}, ValueError, "sampler_logprobs and is_cap go together"),
        ({"sampler_logprobs": ZEROS, "is_cap": 0.0}, ValueError, "is_cap must be > 0, got 0.0"),
        ({"sampler_logprobs": ZEROS, "is_cap": math.nan}, ValueError, "is_cap must be > 0, got nan"),
        ({"sampler_logprobs": torch.zeros(2), "is_cap": 2.0}, ValueError, r"sampler_logprobs must be \(2, 3\)"),
        ({"variant": "dr_grpo"}, ValueError, "variant='dr_grpo' divides by the longest.*pass max_length"),
        ({"variant": "dr_grpo", "max_length": 0}, ValueError, "max_length must be >= 1, got 0"),
    ],
)
def test_grpo_loss(changes, error, message):
    args = {"logprobs": ZEROS, "old_logprobs": ZEROS, "advantages": torch.zeros(2), "mask": TRUE} | changes
    with pytest.raises(error, match=message):
        rk.grpo_loss(**args)


@pytest.mark.parametrize(
    ("mask", "variant", "error", "message"),
    [
        (TRUE, "ppo", ValueError, f"variant must be one of {LISTED}; got 'ppo'"),
        (ZEROS, "grpo", TypeError, "mask must be bool, got torch.float32"),
        (TRUE[0], "grpo", ValueError, r"mask must be \[B, T\], got \(3,\)"),
    ],
)
def test_grpo_loss_weights(mask, variant, error, message):
    with pytest.raises(error, match=message):
        rk.grpo_loss_weights(mask, variant)
