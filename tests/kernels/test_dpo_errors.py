"""dpo_loss and linear_dpo_loss: every wrong use that their docstrings name raises, and says what was expected."""

import math

import pytest
import torch

import rlhf_kernels as rk

INDEX = torch.tensor


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, "loss_type must be one of sigmoid, .*'dpo'"),
        ({"beta": -0.1}, ValueError, "beta must be finite and >= 0, got -0.1"),
        ({"beta": math.nan}, ValueError, "beta must be finite"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
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
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "policy_logps must be float32.*int64"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
        ({"ref_logps": torch.zeros(4, dtype=torch.bool)}, TypeError, "ref_logps must be float32.*bool"),
        ({"ref_logps": torch.zeros(4, device="meta")}, ValueError, "one device.*meta"),
        ({"chosen_idxs": INDEX([0, 1], dtype=torch.int32)}, TypeError, "chosen_idxs must be int64, got torch.int32"),
        ({"rejected_idxs": INDEX([0.0, 1.0])}, TypeError, "rejected_idxs must be int64, got torch.float32"),
        ({"rejected_idxs": INDEX([3])}, ValueError, r"rejected_idxs must be \[2\] like chosen_idxs, got \(1,\)"),
        ({"chosen_idxs": INDEX([[0, 1]])}, ValueError, r"chosen_idxs must be .*\(1, 2\)"),
    ],
)
def test_dpo_loss(backend, device, changes, error, message):
    args = {
        "policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4),
        "chosen_idxs": INDEX([0, 1]), "rejected_idxs": INDEX([2, 3]), "beta": 0.1,
    } | changes  # fmt: skip
    placed = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in args.items()
    }
    with pytest.raises(error, match=message):
        rk.dpo_loss(**placed, backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_idxs": [0, 4]}, r"chosen_idxs must lie in \[0, 4\), got 4"),
        ({"rejected_idxs": [2, -1]}, r"rejected_idxs must lie in \[0, 4\), got -1"),
    ],
)
def test_indices_out_of_range(backend, device, on_cuda, changes, message):
    """CUDA kernels do not raise: that would wait for the device."""
    pairs = {"chosen_idxs": [0, 1], "rejected_idxs": [2, 3]} | changes
    placed = {name: INDEX(idxs, device=device) for name, idxs in pairs.items()}
    logps = torch.zeros(4, device=device)

    def losses():
        return rk.dpo_loss(logps, logps, **placed, backend=backend).losses

    if on_cuda and (backend == "native" or device.type == "cuda"):
        if backend == "reference":
            pytest.skip("torch's own indexing would end the CUDA context")
        assert losses().isnan().tolist() == [False, True]
    else:
        with pytest.raises(IndexError, match=message):
            losses()


def test_indices_out_of_range_of_hidden_states(backend, device, on_cuda):
    if device.type == "cuda" and backend == "reference":
        pytest.skip("torch's own indexing would end the CUDA context")
    hidden, weight = torch.zeros(4, 5, 8, device=device), torch.zeros(9, 8, device=device)
    labels = torch.zeros(4, 5, dtype=torch.int64, device=device)
    pairs = {"chosen_idxs": INDEX([4, 1], device=device), "rejected_idxs": INDEX([0, -1], device=device)}

    def loss():
        return rk.linear_dpo_loss(hidden, weight, labels, torch.zeros(4, device=device), **pairs, backend=backend)

    if on_cuda and backend != "reference":
        found = loss()
        assert found.loss.isnan()
        assert found.chosen_rewards.isnan().tolist() == [True, False]
        assert found.rejected_rewards.isnan().tolist() == [False, True]
    else:
        with pytest.raises(IndexError, match=r"chosen_idxs must lie in \[0, 4\)"):
            loss()


@pytest.mark.parametrize("changes", [{"beta": "0.1"}, {"beta": None}, {"label_smoothing": "0"}, {"loss_type": None}])
def test_constants_of_a_wrong_type(backend, device, changes):
    policy, pair = torch.zeros(2, device=device), (INDEX([0], device=device), INDEX([1], device=device))
    with pytest.raises((TypeError, ValueError)):
        rk.dpo_loss(policy, policy, *pair, **changes, backend=backend)


REF = {"ref_hidden": torch.zeros(4, 5, 6), "ref_weight": torch.zeros(9, 6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 5, 8), "labels": torch.zeros(3, 5, dtype=torch.int64), "ref_logps": torch.zeros(3)},
         ValueError, "S must be even, got 3"),
        ({"ref_logps": None}, ValueError, "'sigmoid' needs one reference.*got none"),
        (REF, ValueError, "'sigmoid' needs one reference.*got both"),
        ({"ref_logps": None, "ref_hidden": REF["ref_hidden"]}, ValueError, "both ref_hidden and ref_weight"),
        ({"ref_logps": None, "ref_weight": REF["ref_weight"]}, ValueError, "both ref_hidden and ref_weight"),
        ({"loss_type": "simpo"}, ValueError, "'simpo' takes no reference"),
        ({"loss_type": "simpo", "ref_logps": None} | REF, ValueError, "'simpo' takes no reference"),
        ({"ref_logps": None, **REF, "ref_hidden": torch.zeros(4, 4, 6)}, ValueError, r"ref_hidden must be \(4, 5, "),
        ({"ref_logps": None, **REF, "ref_weight": torch.zeros(8, 5)}, ValueError, "share D"),
        ({"ref_bias": torch.zeros(9)}, ValueError, "ref_bias"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must be \[4\], got \(3,\)"),
        ({"ref_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "ref_logps must be .*int64"),
        ({"chosen_idxs": INDEX([0])}, ValueError, "both chosen_idxs and rejected_idxs, or neither"),
        ({"rejected_idxs": INDEX([0])}, ValueError, "both chosen_idxs and rejected_idxs, or neither"),
        ({"chosen_idxs": INDEX([], dtype=torch.int64), "rejected_idxs": INDEX([], dtype=torch.int64)},
         ValueError, "no pairs"),
        ({"hidden": torch.zeros(0, 5, 8), "labels": torch.zeros(0, 5, dtype=torch.int64), "ref_logps": torch.zeros(0)},
         ValueError, "no pairs"),
        ({"hidden": torch.zeros(20, 8)}, ValueError, r"hidden must be \[S, T, D\], got \(20, 8\)"),
        ({"labels": torch.zeros(4, 6, dtype=torch.int64)}, ValueError, r"labels must be \(4, 5\).*\(4, 6\)"),
        ({"labels": torch.zeros(4, 5)}, TypeError, "labels must be int64, got torch.float32"),
        ({"labels": torch.full((4, 5), 9)}, IndexError, "9"),
        ({"weight": torch.zeros(9, 7)}, ValueError, r"share D.*\(9, 7\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must be \[9\], got \(8,\)"),
        ({"loss_type": "dpo"}, ValueError, "loss_type must be one of"),
        ({"beta": 0.0, "loss_type": "ipo"}, ValueError, "undefined at beta=0"),
        ({"label_smoothing": 0.7}, ValueError, "label_smoothing must be in"),
        ({"loss_type": "exo"}, ValueError, "'exo' needs label_smoothing > 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
    ],
)  # fmt: skip
def test_linear_dpo_loss(backend, device, changes, error, message):
    args = {
        "hidden": torch.zeros(4, 5, 8), "weight": torch.zeros(9, 8), "labels": torch.zeros(4, 5, dtype=torch.int64),
        "ref_logps": torch.zeros(4),
    } | changes  # fmt: skip
    placed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(error, match=message):
        rk.linear_dpo_loss(**placed, backend=backend)
