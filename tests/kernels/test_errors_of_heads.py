"""Wrong use of the ops that take hidden states and a head: every argument's error says what was expected and came."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T

INDEX = torch.tensor
REF = {"ref_hidden": torch.zeros(4, 5, 6), "ref_weight": torch.zeros(9, 6)}


def set_first(value):
    return lambda t: torch.cat([torch.full_like(t[:1], value), t[1:]])


def set_last(value):
    """The last label of the last sequence is `value`."""

    def change(labels):
        labels = labels.clone()
        labels[-1, -1] = value
        return labels

    return change


def to_meta(tensor):
    return tensor.to("meta")


# A change is another value, or a function of the right one.
LINEAR_LOGPROBS = [
    ({"hidden": lambda t: t[:, :3]}, ValueError, r"share D.*\(6, 3\).*\(9, 4\)"),
    ({"hidden": lambda t: t[0, 0]}, ValueError, r"hidden must be \[\.\.\., D\]"),
    ({"hidden": lambda t: t.long()}, TypeError, "hidden must be float32.*int64"),
    ({"weight": lambda t: t[0]}, ValueError, r"weight must be \[V, D\].*\(4,\)"),
    ({"weight": lambda t: t[:0]}, ValueError, r"V, D >= 1.*\(0, 4\)"),
    ({"weight": lambda t: t.to(torch.complex64)}, TypeError, "weight must be .*complex64"),
    ({"bias": lambda t: t[:8]}, ValueError, r"bias must be \[9\], got \(8,\)"),
    ({"bias": lambda t: t[:, None]}, ValueError, r"bias must be \[9\], got \(9, 1\)"),
    ({"bias": lambda t: t.int()}, TypeError, "bias must be .*int32"),
    ({"targets": lambda t: t[:5]}, ValueError, r"targets must be \(6,\).*\(5,\)"),
    ({"targets": lambda t: t[:, None]}, ValueError, r"targets must be \(6,\).*\(6, 1\)"),
    ({"targets": lambda t: t.int()}, TypeError, "targets must be int64, got torch.int32"),
    ({"targets": set_first(9)}, IndexError, r"9.*\[0, 9\)"),
    ({"targets": set_first(-1)}, IndexError, r"-1.*\[0, 9\).*-100"),
    ({"targets": set_first(-100), "ignore_index": -1}, IndexError, r"-100.*-1"),
    ({"targets": set_first(1 << 40)}, IndexError, str(1 << 40)),
    ({"weight": to_meta}, ValueError, "one device.*meta"),
    ({"targets": to_meta}, ValueError, "one device.*meta"),
    ({"outputs": ("entropie",)}, ValueError, "entropie"),
    ({"temperature": 0.0}, ValueError, "temperature must be"),
    ({"temperature": -1.0}, ValueError, "temperature must be"),
    ({"temperature": math.nan}, ValueError, "temperature must be"),
    ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be"),
    ({"logit_softcap": -3.0}, ValueError, "logit_softcap must be"),
]

LINEAR_KL = [
    ({"hidden": lambda t: t[:, :3]}, ValueError, r"share D.*\(6, 3\).*\(9, 4\)"),
    ({"hidden": lambda t: t[:5]}, ValueError, r"ref_hidden must be \(5, .*\(6, 5\)"),
    ({"ref_hidden": lambda t: t[:, :3]}, ValueError, r"ref_hidden and ref_weight must share D"),
    ({"ref_hidden": lambda t: t.long()}, TypeError, "ref_hidden must be .*int64"),
    ({"ref_weight": lambda t: t[:8]}, ValueError, "share a vocabulary.*9.*8"),
    ({"ref_weight": lambda t: t[0]}, ValueError, r"ref_weight must be \[V, D\]"),
    ({"bias": lambda t: t[:8]}, ValueError, r"bias must be \[9\], got \(8,\)"),
    ({"ref_bias": lambda t: t[:8]}, ValueError, r"ref_bias must be \[9\], got \(8,\)"),
    ({"mask": lambda t: t.int()}, TypeError, "mask must be bool, got torch.int32"),
    ({"mask": lambda t: t[:5]}, ValueError, r"mask must be \(6,\).*\(5,\)"),
    ({"mask": to_meta}, ValueError, "one device.*meta"),
    ({"ref_hidden": to_meta, "ref_weight": to_meta}, ValueError, "one device.*meta"),
    ({"direction": "reverse"}, ValueError, "policy_ref, ref_policy.*'reverse'"),
    ({"temperature": 0.0}, ValueError, "temperature must be"),
    ({"ref_logit_softcap": -1.0}, ValueError, "logit_softcap must be"),
    ({"ref_logit_scale": math.nan}, ValueError, "logit_scale must be"),
]

LINEAR_DPO_LOSS = [
    (
        {"hidden": torch.zeros(3, 5, 8), "labels": torch.zeros(3, 5, dtype=torch.int64), "ref_logps": torch.zeros(3)},
        ValueError,
        "S must be even, got 3",
    ),
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
    (
        {"chosen_idxs": INDEX([], dtype=torch.int64), "rejected_idxs": INDEX([], dtype=torch.int64)},
        ValueError,
        "no pairs",
    ),
    (
        {"hidden": torch.zeros(0, 5, 8), "labels": torch.zeros(0, 5, dtype=torch.int64), "ref_logps": torch.zeros(0)},
        ValueError,
        "no pairs",
    ),
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
]

SEQUENCE_LOGPROBS = [
    ({"hidden": lambda t: t.flatten(0, 1), "labels": torch.flatten}, ValueError, r"must be \[B, T, D\], got \(10, 8\)"),
    ({"labels": lambda t: t[:, 1:]}, ValueError, r"labels must be \(2, 5\).*\(2, 4\)"),
    ({"labels": lambda t: t.int()}, TypeError, "labels must be int64"),
    ({"labels": set_last(17)}, IndexError, "17"),
    ({"temperature": 0.0}, ValueError, "temperature"),
]

CU, IDS = INDEX([0, 4, 4, 10]), INDEX([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
PACKED = [  # of sequence_logprobs and linear_dpo_loss
    ({"cu_seqlens": CU, "position_ids": IDS}, ValueError, "pass one of them, got both"),
    ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    ({"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens must be \[S \+ 1\], got \(1, 4\)"),
    ({"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must be \[S \+ 1\], got \(0,\)"),
    ({"cu_seqlens": CU.to("meta")}, ValueError, "one device.*cu_seqlens on meta"),
    (
        {"cu_seqlens": CU, "hidden": torch.zeros(2, 5, 8), "labels": torch.zeros(2, 5).long()},
        ValueError,
        r"with cu_seqlens hidden must be \[1, N, D\] or \[N, D\], got \(2, 5, 8\)",
    ),
    ({"cu_seqlens": CU, "hidden": torch.zeros(8)}, ValueError, r"with cu_seqlens hidden .* got \(8,\)"),
    ({"cu_seqlens": CU, "labels": torch.zeros(10).long()}, ValueError, r"labels must be \(1, 10\).*\(10,\)"),
    ({"cu_seqlens": CU, "labels": torch.zeros(1, 10)}, TypeError, "labels must be int64, got torch.float32"),
    ({"position_ids": IDS.float()}, TypeError, "position_ids must be int32 or int64, got torch.float32"),
    ({"position_ids": IDS[0]}, ValueError, r"position_ids must be \(1, 10\) like labels, got \(10,\)"),
    ({"position_ids": IDS.to("meta")}, ValueError, "one device.*position_ids on meta"),
    (
        {"position_ids": IDS, "hidden": torch.zeros(8)},
        ValueError,
        r"with position_ids hidden must be \[B, T, D\] or \[N, D\], got \(8,\)",
    ),
    ({"position_ids": IDS + 1}, ValueError, "be 0 at the first token .* got 1 instead of 0 at token 0 of 10"),
    ({"position_ids": IDS.index_fill(1, torch.tensor(6), 3)}, ValueError, "got 3 instead of 2 at token 6 of 10"),
    ({"position_ids": IDS.index_fill(1, torch.tensor(9), 1)}, ValueError, "got 1 instead of 5 at token 9 of 10"),
    (
        {"position_ids": IDS.view(2, 5), "hidden": torch.zeros(2, 5, 8), "labels": torch.zeros(2, 5).long()},
        ValueError,
        "got 1 instead of 0 at token 5 of 10",
    ),
    ({"hidden": torch.zeros(10, 8), "labels": torch.zeros(10).long()}, ValueError, r"hidden must be \[., T, D\], got"),
]

PACKED_DPO_LOSS = [
    ({"cu_seqlens": INDEX([0, 4, 6, 10]), "ref_logps": torch.zeros(3)}, ValueError, "S must be even, got 3"),
    ({"ref_logps": torch.zeros(10)}, ValueError, r"ref_logps must be \[2\], got \(10,\)"),
    (
        {"ref_logps": None, "ref_hidden": torch.zeros(1, 9, 6), "ref_weight": torch.zeros(17, 6)},
        ValueError,
        r"ref_hidden must be \(1, 10, 'D'\), got \(1, 9, 6\)",
    ),
    (
        {"ref_logps": None, "ref_hidden": torch.zeros(10, 6), "ref_weight": torch.zeros(17, 6)},
        ValueError,
        r"ref_hidden must be \(1, 10, 'D'\), got \(10, 6\)",
    ),
]

HEAD = dict(zip(("hidden", "weight", "targets", "bias"), T.make_head(6, 4, 9, bias=True), strict=True))
MODELS = T.make_kl_inputs(6, 4, 9, ref_d=5, bias=True, masked=0.5)._asdict()
SEQUENCES = {"hidden": torch.zeros(2, 5, 8), "weight": torch.zeros(17, 8), "labels": torch.zeros(2, 5).long()}
RESPONSES = {"hidden": torch.zeros(4, 5, 8), "weight": torch.zeros(9, 8), "labels": torch.zeros(4, 5).long()}
ONE_ROW = {"hidden": torch.zeros(1, 10, 8), "weight": torch.zeros(17, 8), "labels": torch.zeros(1, 10).long()}
CASES = [  # function, right arguments, wrong ones
    (rk.linear_logprobs, HEAD, LINEAR_LOGPROBS),
    (rk.linear_kl, MODELS, LINEAR_KL),
    (rk.sequence_logprobs, SEQUENCES, SEQUENCE_LOGPROBS),
    (rk.sequence_logprobs, ONE_ROW, PACKED),
    (rk.linear_dpo_loss, ONE_ROW | {"loss_type": "simpo"}, PACKED),
    (rk.linear_dpo_loss, ONE_ROW | {"ref_logps": torch.zeros(2), "cu_seqlens": INDEX([0, 4, 10])}, PACKED_DPO_LOSS),
    (rk.linear_dpo_loss, RESPONSES | {"ref_logps": torch.zeros(4)}, LINEAR_DPO_LOSS),
]
ROWS = [(function, right, *row) for function, right, wrong in CASES for row in wrong]


def placed(arguments, device):
    """The arguments on the device, but for those that are wrong by being on another one."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(
    ("function", "right", "changes", "error", "message"),
    ROWS,
    ids=[f"{function.__name__}-{'-'.join(changes)}" for function, _, changes, *_ in ROWS],
)
def test_wrong_use(backend, device, function, right, changes, error, message):
    changed = {name: change(right[name]) if callable(change) else change for name, change in changes.items()}
    if "ref_weight" in changes and "ref_bias" in right:  # whose bias must fit it
        changed["ref_bias"] = None
    with pytest.raises(error, match=message):
        function(**placed(right | changed, device), backend=backend)


def test_a_wrong_target_in_a_place_that_is_ignored_later_still_raises(backend, device):
    """-100 is only ignored while it is `ignore_index`; the last row is looked at too."""
    head = T.make_head(200, 4, 9, masked=0.5, device=device)
    head.targets[-1] = 9
    with pytest.raises(IndexError, match="9"):
        rk.linear_logprobs(head.hidden, head.weight, head.targets, backend=backend)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 4, 10], "start at 0 and end at the number of tokens, 10; got 1 and 10"),
        ([0, 4, 9], "got 0 and 9"),
        ([0, 4, 2**40], f"got 0 and {2**40}"),  # never read there
        ([0, 6, 4, 10], "cu_seqlens must not decrease, got 4 after 6 at index 2"),
        ([0, 2**40, 10], f"got 10 after {2**40} at index 2"),
        ([0, -3, 10], "got -3 after 0 at index 1"),
    ],
)
def test_wrong_values_of_cu_seqlens(backend, device, cu, message):
    """On a CPU they raise; on a GPU, which reading them would wait for, every result is NaN."""
    arguments = placed(ONE_ROW | {"cu_seqlens": INDEX(cu)}, device)
    if device.type == "cuda":
        assert rk.sequence_logprobs(**arguments, backend=backend).logprobs.isnan().all()
        return
    with pytest.raises(ValueError, match=message):
        rk.sequence_logprobs(**arguments, backend=backend)


def test_indices_out_of_range_of_hidden_states(backend, device, on_cuda):
    if device.type == "cuda" and backend == "reference":
        pytest.skip("torch's own indexing would end the CUDA context")
    pairs = {"chosen_idxs": INDEX([4, 1]), "rejected_idxs": INDEX([0, -1])}
    arguments = placed(RESPONSES | {"ref_logps": torch.zeros(4)} | pairs, device)
    if on_cuda and backend != "reference":
        result = rk.linear_dpo_loss(**arguments, backend=backend)
        assert result.loss.isnan()
        assert result.chosen_rewards.isnan().tolist() == [True, False]
        assert result.rejected_rewards.isnan().tolist() == [False, True]
    else:
        with pytest.raises(IndexError, match=r"chosen_idxs must lie in \[0, 4\)"):
            rk.linear_dpo_loss(**arguments, backend=backend)
