"""Wrong use of the losses of numbers a response or token: every argument's error says what was expected and came."""

import math

import pytest
import torch

import rlhf_kernels as rk

ZEROS, TRUE = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
INDEX, LOGPS, META = torch.tensor, torch.zeros(4), torch.zeros(4, device="meta")
PAIRS = {"chosen_idxs": INDEX([0, 1]), "rejected_idxs": INDEX([2, 3])}
UNPAIRED = {"policy_logps": LOGPS, "ref_logps": LOGPS, "desirable": LOGPS.bool()}
VARIANTS = "grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce, sapo"

BETA = [
    ({"beta": -0.1}, ValueError, "beta must be finite and >= 0, got -0.1"),
    ({"beta": math.nan}, ValueError, "beta must be finite"),
    ({"beta": math.inf}, ValueError, "beta must be finite"),
]

DPO_LOSS = [
    ({"loss_type": "dpo"}, ValueError, "loss_type must be one of sigmoid, .*'dpo'"),
    *BETA,
    ({"beta": 0.0, "loss_type": "ipo"}, ValueError, "'ipo' is undefined at beta=0"),
    ({"beta": 0.0, "loss_type": "ipo_mean"}, ValueError, "'ipo_mean' is undefined at beta=0"),
    ({"beta": 0.0, "loss_type": "sppo"}, ValueError, "'sppo' is undefined at beta=0"),
    ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be in"),
    ({"label_smoothing": 0.1, "loss_type": "hinge"}, ValueError, "defined for sigmoid, robust, simpo.*'hinge'"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "label_smoothing is defined for"),
    ({"label_smoothing": 0.1, "loss_type": "apo_zero"}, ValueError, "exo, aot; loss_type='apo_zero' takes 0"),
    ({"label_smoothing": 0.1, "loss_type": "apo_down"}, ValueError, "'apo_down' takes 0"),
    ({"label_smoothing": 0.1, "loss_type": "sppo"}, ValueError, "'sppo' takes 0"),
    ({"label_smoothing": 0.1, "loss_type": "nca"}, ValueError, "'nca' takes 0"),
    ({"label_smoothing": 0.1, "loss_type": "discopop"}, ValueError, "'discopop' takes 0"),
    ({"loss_type": "exo"}, ValueError, "'exo' needs label_smoothing > 0"),
    ({"loss_type": "aot", "ref_logps": None}, ValueError, r"'aot' needs ref_logps \[S\]"),
    ({"gamma": math.inf, "loss_type": "simpo", "ref_logps": None}, ValueError, "gamma must be finite"),
    ({"ref_logps": None}, ValueError, r"'sigmoid' needs ref_logps \[S\]"),
    ({"loss_type": "simpo"}, ValueError, "'simpo' takes no reference"),
    ({"loss_type": "simpo", "ref_logps": None}, ValueError, "'simpo' is length-normalised and needs token_counts"),
    ({"loss_type": "ipo_mean"}, ValueError, "'ipo_mean' is length-normalised and needs token_counts"),
    (
        {"loss_type": "ipo_mean", "token_counts": INDEX([1, 2])},
        ValueError,
        r"token_counts must be \[4\], got \(2,\)",
    ),
    ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
    ({"policy_logps": LOGPS.long()}, TypeError, "policy_logps must be float32.*int64"),
    ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
    ({"ref_logps": LOGPS.bool()}, TypeError, "ref_logps must be float32.*bool"),
    ({"ref_logps": META}, ValueError, "one device.*meta"),
    ({"chosen_idxs": INDEX([0, 1], dtype=torch.int32)}, TypeError, "chosen_idxs must be int64, got torch.int32"),
    ({"rejected_idxs": INDEX([0.0, 1.0])}, TypeError, "rejected_idxs must be int64, got torch.float32"),
    ({"rejected_idxs": INDEX([3])}, ValueError, r"rejected_idxs must be \[2\] like chosen_idxs, got \(1,\)"),
    ({"chosen_idxs": INDEX([[0, 1]])}, ValueError, r"chosen_idxs must be .*\(1, 2\)"),
]

BRADLEY_TERRY_LOSS = [
    ({"rejected_rewards": torch.zeros(2)}, ValueError, r"rejected_rewards must be \[3\], got \(2,\)"),
    ({"chosen_rewards": torch.zeros(3, 1)}, ValueError, r"chosen_rewards must be \[S\], got \(3, 1\)"),
    ({"margin": torch.zeros(1)}, ValueError, r"margin must be \[3\], got \(1,\)"),
    ({"margin": torch.zeros(3, dtype=torch.int64)}, TypeError, "margin must be .*int64"),
    ({"chosen_rewards": torch.zeros(3, dtype=torch.int32)}, TypeError, "chosen_rewards must be .*int32"),
    ({"rejected_rewards": torch.zeros(3, device="meta")}, ValueError, "one device.*meta"),
    ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing"),
    ({"center_coefficient": -1.0}, ValueError, "center_coefficient must be finite and >= 0"),
    ({"center_coefficient": math.inf}, ValueError, "center_coefficient must be finite"),
]

UNPAIRED_LOSS = [  # bco_loss and kto_loss
    ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
    ({"policy_logps": LOGPS.long()}, TypeError, "policy_logps must be float32.*int64"),
    ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
    ({"ref_logps": META}, ValueError, "one device.*meta"),
    ({"desirable": LOGPS.long()}, TypeError, "desirable must be bool, got torch.int64"),
    ({"desirable": LOGPS}, TypeError, "desirable must be bool, got torch.float32"),
    ({"desirable": torch.ones(3, dtype=torch.bool)}, ValueError, r"desirable must be \[4\], got \(3,\)"),
    ({"desirable": META.bool()}, ValueError, "one device.*meta"),
    *BETA,
]

BCO_LOSS = [
    ({"reward_shift": 0.0}, TypeError, "reward_shift must be a scalar Tensor, got float"),
    ({"reward_shift": torch.zeros(1)}, ValueError, r"reward_shift must be a scalar Tensor, got shape \(1,\)"),
]

KTO_LOSS = [
    ({"kl": 0.0}, TypeError, "kl must be a scalar Tensor, got float"),
    ({"kl": LOGPS}, ValueError, r"kl must be a scalar Tensor, got shape \(4,\)"),
    ({"kl": torch.tensor(0)}, TypeError, "kl must be float32.*int64"),
    ({"desirable_weight": -1.0}, ValueError, "desirable_weight must be finite and >= 0, got -1.0"),
    ({"undesirable_weight": math.nan}, ValueError, "undesirable_weight must be finite and >= 0, got nan"),
]

ORPO_LOSS = [
    ({"policy_logps": torch.zeros(4, 1)}, ValueError, r"policy_logps must be \[S\], got \(4, 1\)"),
    ({"policy_logps": LOGPS.long()}, TypeError, "policy_logps must be float32.*int64"),
    ({"token_counts": torch.ones(3)}, ValueError, r"token_counts must be \[4\], got \(3,\)"),
    ({"token_counts": LOGPS.bool()}, TypeError, "token_counts must be integers.*bool"),
    ({"chosen_idxs": INDEX([0.0, 1.0])}, TypeError, "chosen_idxs must be int64, got torch.float32"),
    ({"rejected_idxs": INDEX([3])}, ValueError, r"rejected_idxs must be \[2\] like chosen_idxs"),
    ({"rejected_idxs": INDEX([2, 4])}, IndexError, r"rejected_idxs must lie in \[0, 4\), got 4"),
    ({"token_counts": META}, ValueError, "one device.*meta"),
    *BETA,
]

PPO_LOSS = [
    ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs must be \[B, T\], got \(3,\)"),
    ({"logprobs": ZEROS.long()}, TypeError, "logprobs must be float32.*int64"),
    ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must be \(2, 3\) like logprobs, got \(2, 4\)"),
    ({"advantages": torch.zeros(2, 1)}, ValueError, r"advantages must be .*got \(2, 1\)"),
    ({"advantages": ZEROS.long()}, TypeError, "advantages must be float32.*int64"),
    ({"mask": ZEROS}, TypeError, "mask must be bool, got torch.float32"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask must be \(2, 3\) like logprobs, got \(2,\)"),
    ({"mask": TRUE.to("meta")}, ValueError, "one device.*meta"),
    ({"advantages": ZEROS.to("meta")}, ValueError, "one device.*meta"),
    ({"clip_low": 1.1}, ValueError, r"clip_low must be in \[0, 1\].*got 1.1"),
    ({"clip_low": -0.1}, ValueError, "clip_low must be in"),
    ({"clip_high": -0.1}, ValueError, "clip_high must be >= 0.*got -0.1"),
    ({"clip_high": math.nan}, ValueError, "clip_high must be >= 0.*got nan"),
]

VALUE_LOSS = [
    ({"values": torch.zeros(3)}, ValueError, r"values must be \[B, T\], got \(3,\)"),
    ({"old_values": torch.zeros(2, 4)}, ValueError, r"old_values must be \(2, 3\) like values, got \(2, 4\)"),
    ({"returns": torch.zeros(2)}, ValueError, r"returns must be \(2, 3\) like values, got \(2,\)"),
    ({"returns": ZEROS.long()}, TypeError, "returns must be float32.*int64"),
    ({"mask": ZEROS}, TypeError, "mask must be bool, got torch.float32"),
    ({"mask": TRUE.to("meta")}, ValueError, "one device.*meta"),
    ({"clip": -0.2}, ValueError, "clip must be >= 0 or None, got -0.2"),
    ({"clip": math.nan}, ValueError, "clip must be >= 0 or None, got nan"),
]

GRPO_LOSS = [
    ({"variant": "ppo"}, ValueError, f"variant must be one of {VARIANTS}; got 'ppo'"),
    ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs must be \[B, T\], got \(3,\)"),
    ({"logprobs": ZEROS.long()}, TypeError, "logprobs must be float32.*int64"),
    ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must be \(2, 3\) like logprobs, got \(2, 4\)"),
    ({"advantages": torch.zeros(2, 3)}, ValueError, r"advantages must be \[2\], got \(2, 3\)"),
    ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[2\], got \(3,\)"),
    ({"advantages": torch.zeros(2).long()}, TypeError, "advantages must be float32.*int64"),
    ({"advantages": torch.zeros(2, device="meta")}, ValueError, "one device.*advantages on meta"),
    ({"mask": ZEROS}, TypeError, "mask must be bool, got torch.float32"),
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
]

KL_PENALTY = [
    ({"ref_logprobs": torch.zeros(2)}, ValueError, r"share a shape.*\(4,\) and \(2,\)"),
    ({"ref_logprobs": LOGPS.long()}, TypeError, r"ref_logprobs must be .*int64"),
    ({"ref_logprobs": META}, ValueError, r"one device.*meta"),
    ({"estimator": "k4"}, ValueError, r"k1, k2, k3.*'k4'"),
]

GRPO_CLIP_FRACTION = [
    ({"variant": "ppo"}, ValueError, "variant must be one of grpo, .*; got 'ppo'"),
    ({"advantages": ZEROS}, ValueError, r"advantages must be \[2\]"),
    ({"clip_low": 2.0}, ValueError, "clip_low must be in"),
    ({"mask": ZEROS}, TypeError, "mask must be bool"),
]

GRPO_COUNTS = [
    ({"variant": "ppo"}, ValueError, f"variant must be one of {VARIANTS}; got 'ppo'"),
    ({"mask": ZEROS}, TypeError, "mask must be bool, got torch.float32"),
    ({"mask": TRUE[0]}, ValueError, r"mask must be \[B, T\], got \(3,\)"),
]

DUAL_CLIP = [
    ({"dual_clip": bound}, ValueError, f"dual_clip must be > 1, got {bound}") for bound in (1.0, 0.5, math.nan)
]

TOKENS = {"logprobs": ZEROS, "old_logprobs": ZEROS, "advantages": ZEROS, "mask": TRUE}
VALUES = {"values": ZEROS, "old_values": ZEROS, "returns": ZEROS, "mask": TRUE}
SEQUENCES = TOKENS | {"advantages": torch.zeros(2)}
COUNTED = {"policy_logps": LOGPS, "token_counts": torch.ones(4)} | PAIRS
PLAIN = [  # function, right arguments, wrong ones
    (rk.bco_loss, UNPAIRED | {"reward_shift": torch.tensor(0.0)}, UNPAIRED_LOSS + BCO_LOSS),
    (rk.kto_loss, UNPAIRED | {"kl": torch.tensor(0.0)}, UNPAIRED_LOSS + KTO_LOSS),
    (rk.orpo_loss, COUNTED, ORPO_LOSS),
    (rk.ppo_loss, TOKENS, PPO_LOSS + DUAL_CLIP),
    (rk.clip_fraction, TOKENS, PPO_LOSS),
    (rk.value_loss, VALUES, VALUE_LOSS),
    (rk.grpo_loss, SEQUENCES, GRPO_LOSS),
    (rk.grpo_clip_fraction, SEQUENCES, GRPO_CLIP_FRACTION),
    (rk.grpo_loss_weights, {"mask": TRUE, "variant": "grpo"}, GRPO_COUNTS),
]
WITH_BACKENDS = [
    (rk.dpo_loss, {"policy_logps": LOGPS, "ref_logps": LOGPS, "beta": 0.1} | PAIRS, DPO_LOSS),
    (rk.bradley_terry_loss, {"chosen_rewards": torch.zeros(3), "rejected_rewards": torch.zeros(3)}, BRADLEY_TERRY_LOSS),
    (rk.kl_penalty, {"logprobs": LOGPS, "ref_logprobs": LOGPS, "estimator": "k1"}, KL_PENALTY),
]


def each(functions):
    rows = [(function, right, *row) for function, right, wrong in functions for row in wrong]
    names = [f"{function.__name__}-{'-'.join(changes)}" for function, _, changes, *_ in rows]
    return pytest.mark.parametrize(("function", "right", "changes", "error", "message"), rows, ids=names)


def placed(arguments, device):
    """The arguments on the device, but for those that are wrong by being on another one."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in arguments.items()
    }


@each(PLAIN)
def test_wrong_use_of_losses_in_plain_torch(function, right, changes, error, message):
    with pytest.raises(error, match=message):
        function(**right | changes)


@each(WITH_BACKENDS)
def test_wrong_use_of_losses_with_backends(backend, device, function, right, changes, error, message):
    with pytest.raises(error, match=message):
        function(**placed(right | changes, device), backend=backend)


@pytest.mark.parametrize("changes", [{"beta": "0.1"}, {"beta": None}, {"label_smoothing": "0"}, {"loss_type": None}])
def test_constants_of_a_wrong_type(backend, device, changes):
    arguments = placed({"policy_logps": LOGPS, "ref_logps": LOGPS} | PAIRS, device)
    with pytest.raises((TypeError, ValueError)):
        rk.dpo_loss(**arguments, **changes, backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_idxs": INDEX([0, 4])}, r"chosen_idxs must lie in \[0, 4\), got 4"),
        ({"rejected_idxs": INDEX([2, -1])}, r"rejected_idxs must lie in \[0, 4\), got -1"),
    ],
)
def test_indices_out_of_range(backend, device, on_cuda, changes, message):
    """CUDA kernels do not raise: that would wait for the device."""
    arguments = placed({"policy_logps": LOGPS, "ref_logps": LOGPS} | PAIRS | changes, device)
    if on_cuda and (backend == "native" or device.type == "cuda"):
        if backend == "reference":
            pytest.skip("torch's own indexing would end the CUDA context")
        assert rk.dpo_loss(**arguments, backend=backend).losses.isnan().tolist() == [False, True]
    else:
        with pytest.raises(IndexError, match=message):
            rk.dpo_loss(**arguments, backend=backend)
