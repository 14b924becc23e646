"""benchmarks/harness: the truth that errors are told against, the peers, and what becomes of a case's rows."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.harness import overlays
from benchmarks.harness.case import ROWS
from benchmarks.harness.grpo import GRPO
from benchmarks.harness.linear_dpo import LinearDPO
from benchmarks.harness.linear_kl import LinearKL
from benchmarks.harness.linear_logprobs import LinearLogprobs, eager_logprobs
from benchmarks.harness.measuring import LEAST_TURNS, Clock, Contender, admit, measure, take_turns
from benchmarks.harness.pair_losses import WAYS, PairLoss
from benchmarks.harness.peers import GPU_ALONE, TRL, Peer
from benchmarks.harness.record import Results

CPU = Clock(torch.device("cpu"))
TINY = {"backends": ("native",), "tile": 64}
CASES = {
    "linear_logprobs": LinearLogprobs(72, 32, 133, masked=0.5, **TINY),
    "soft cap": LinearLogprobs(72, 32, 133, softcap=3.0, **TINY),
    "linear_kl": LinearKL(72, 32, 133, **TINY),
    "linear_dpo_loss": LinearDPO(72, 32, 133, budgets_mib={"larger": 100}, **TINY),
    "grpo": GRPO(72, 32, 133, **TINY),
}


def rows_of(case, **options):
    """By contender, of one turn, without those that compile."""
    quick = {"seconds": 1e6, "most_turns": 1, "may_start": lambda peer: not peer.slow_start}
    return {row["contender"]: row for row in measure(case, CPU, **quick | options)}


@pytest.mark.parametrize("name", ["soft cap", "linear_kl"])
def test_the_truth_is_that_of_fp64(name):
    """Of the first rows; the same as of all of them, by autograd."""
    case = replace(CASES[name])
    case.make()
    inputs = [x.detach().double() if x.is_floating_point() else x for x in case.inputs()]
    inputs[0].requires_grad_()
    values = case.eager(*inputs, **case.head)
    (gradient,) = torch.autograd.grad(values.sum(), inputs[0])
    assert case.truth.dtype == case.true_gradient.dtype == torch.float64
    torch.testing.assert_close(case.truth, values[:ROWS].detach())
    torch.testing.assert_close(case.true_gradient, gradient[:ROWS])


@pytest.mark.parametrize("name", CASES)
def test_every_peer_has_a_row(name):
    """Measured and close to the truth, or refused with a reason."""
    rows = rows_of(replace(CASES[name]))
    if name == "soft cap":
        assert rows["torch chunked"]["status"] == "takes no soft cap"
        assert rows["verl"]["status"] == "runs on GPUs alone; takes no soft cap"
        assert rows["torch.compile"]["status"] == "not measured: time"
    assert {"native", "eager", "bare GEMMs", TRL, "torch.compile"} <= set(rows)
    measured = {name for name, row in rows.items() if row["status"] == "measured"}
    assert {"native", "eager", "bare GEMMs", TRL} <= measured
    for name in measured - {"bare GEMMs"}:
        row = rows[name]
        assert row["max_error"] < 1e-4 and row.get("hidden_gradient_error", 0) < 1e-4, row
        assert row["total_ms"]["min"] <= row["total_ms"]["median"] and row["gemm_fraction_total"] > 0
        assert name == "native" or row["over_native"]["total"] > 0
    assert all(row["status"] for row in rows.values())


def test_a_sequences_loss_has_the_truth_of_its_first_tokens():
    """By hand: of the tokens that are judged, as many of each sequence."""
    case = replace(CASES["linear_dpo_loss"])
    case.make()
    labels = case.targets_of(ROWS)
    assert int((labels[:, 1:] != -100).sum()) == ROWS and case.truth.dim() == 0 and case.true_gradient is None

    def sums(hidden, weight):
        logits = hidden[:, :-1].detach().double() @ weight.detach().double().T
        picked = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return torch.where(labels[:, 1:] == -100, 0.0, picked).sum(-1)

    chosen, rejected = (sums(case.hidden, case.weight) - sums(case.ref_hidden, case.ref_weight)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.testing.assert_close(case.truth, expected)


def with_peers(case, *peers):
    changed = replace(case)
    changed.choose_peers = lambda: list(peers)
    return changed


def test_what_a_peer_cannot_do_is_said():
    missing = Peer("missing", lambda *inputs: overlays.without_init("nowhere", "module"))
    raising = Peer("raising", lambda *inputs: 1 / 0)
    elsewhere = Peer("elsewhere", eager_logprobs, GPU_ALONE)
    rows = rows_of(with_peers(CASES["linear_logprobs"], missing, raising, elsewhere))
    assert rows["missing"]["status"] == "not installed: build/peers/nowhere-*"
    assert rows["raising"]["status"] == "cannot run here: ZeroDivisionError: division by zero"
    assert rows["elsewhere"]["status"] == "runs on GPUs alone"


def test_a_wrong_peer_shows():
    """In its error, in its gradient's, and where its bits depend on the batch."""

    def wrong(hidden, weight, targets):
        return eager_logprobs(hidden, weight, targets) * (1 + 1e-3 * (len(hidden) > ROWS))

    row = rows_of(with_peers(CASES["linear_logprobs"], Peer("wrong", wrong)))["wrong"]
    assert row["max_error"] > 1e-3 and row["hidden_gradient_error"] > 5e-4 and row["batch_invariant"] is False


# --- turns, by a clock whose times are made up ---


class MadeUp(Clock):
    """Every run of a peer takes what `seconds` says; bare GEMMs take a second."""

    def __init__(self, **seconds):
        super().__init__(torch.device("cpu"))
        self.seconds = seconds

    def ms(self, run):
        run()
        arguments = getattr(run, "args", ()) or [cell.cell_contents for cell in getattr(run, "__closure__", None) or ()]
        peers = [argument for argument in arguments if isinstance(argument, Peer)]
        return 1e3 * (self.seconds[peers[0].name] if peers else 1.0)


def test_who_would_not_fit_into_five_turns_is_too_slow_and_all_others_have_five():
    peers = [Peer(name, eager_logprobs) for name in ("native", "quick", "slow", "hopeless")]
    clock = MadeUp(native=1, quick=2, slow=8, hopeless=41)
    rows = measure(with_peers(CASES["linear_logprobs"], *peers), clock, seconds=60, most_turns=9)
    rows = {row["contender"]: row for row in rows}
    # A turn is forward and total: 2 s of bare GEMMs, 2 of native, 4 of quick, 16 of slow.
    assert rows["slow"]["status"] == "too slow to take turns: 16.0 s forward and total, from one run"
    assert rows["hopeless"]["status"].startswith("too slow to take turns: about 46 s a step")
    measured = {name: row["rounds"] for name, row in rows.items() if row["status"] == "measured"}
    assert measured == {"bare GEMMs": 7, "native": 7, "quick": 7}
    assert rows["quick"]["over_native"] == {"forward": 2, "total": 2}


def test_native_has_five_turns_whatever_the_time():
    clock = MadeUp(native=30, quick=1)
    peers = [Peer(name, eager_logprobs) for name in ("native", "quick")]
    rows = list(measure(with_peers(CASES["linear_logprobs"], *peers), clock, seconds=1, most_turns=9))
    assert {row["contender"]: row.get("rounds") for row in rows if row["status"] == "measured"} == {
        "bare GEMMs": LEAST_TURNS, "native": LEAST_TURNS
    }  # fmt: skip


def contender(name, turn_s=1.0, run=lambda: None):
    return Contender(name, (None, run), None, {}, turn_s)


def test_the_fastest_are_admitted_first():
    contenders = [contender("bare GEMMs", 1), contender("native", 1), contender("b", 3), contender("a", 2)]
    able = admit(contenders, ("bare GEMMs", "native"), seconds=20, turns=5)
    assert [one.name for one in able] == ["bare GEMMs", "native", "a"]
    able = admit(contenders, ("bare GEMMs", "native", "b"), seconds=20, turns=5)
    assert [one.name for one in able] == ["bare GEMMs", "native", "b"], "who is needed, however slow"


def test_who_runs_before_whom_changes_from_turn_to_turn():
    """Or one contender would always find the caches as the same other one left them."""
    taken = []
    contenders = [contender(name, run=partial(taken.append, name)) for name in ("bare GEMMs", "native", "eager")]
    case = replace(CASES["linear_logprobs"])
    case.make_inputs()
    take_turns(case, CPU, contenders, 20)
    orders = {tuple(taken[k : k + 3]) for k in range(0, len(taken), 3)}
    assert len(taken) == 60 and all(len(set(order)) == 3 for order in orders)
    assert len(orders) == 6, "every order came"


# --- the rest ---


@pytest.mark.parametrize("op", WAYS)
def test_pair_losses(op):
    rows = rows_of(PairLoss(op, 64, backends=("native",)))
    assert rows["native"]["max_error"] < 1e-5 and rows["eager"]["over_native"]["forward"] > 0


def test_peak_memory_on_a_cpu():
    """A process that holds the logits and their gradients holds more than one that does not."""
    case = LinearLogprobs(512, 64, 40000, rivals=("eager",), budgets_mib={"least": 8}, **TINY)
    mib = {name: row.get("peak_total_mib") for name, row in rows_of(case, peaks_s=1e6).items()}
    logits_mib = 4 * case.n * case.v / 2**20
    assert mib["eager"] > 1.8 * logits_mib > logits_mib / 2 > mib["native, least budget"]


def test_a_frozen_head_has_no_gradient_and_two_products():
    case = LinearLogprobs(64, 32, 300, frozen=True, rivals=("eager",), **TINY)
    rows = rows_of(case)
    assert case.products == (1, 2) and len(case.leaves) == 1 and case.weight.grad is None
    assert rows["bare GEMMs"]["status"] == rows["native"]["status"] == "measured"
    assert rows["native"]["frozen"] and rows["native"]["hidden_gradient_error"] < 1e-5


def test_a_file_is_added_to_where_machine_and_versions_are_the_same(tmp_path):
    path, head = tmp_path / "cpu.json", {"device": {"device": "one"}, "versions": {}, "commit": "a"}
    row = {"op": "x", "n": 1, "contender": "native", "total_ms": 1}
    Results.open(path, head).add(row)
    again = Results.open(path, head)
    again.add(row | {"total_ms": 2})
    again.add(row | {"n": 2})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["n"], row["total_ms"]) for row in rows] == [(1, 2), (2, 1)]
    Results.open(path, head | {"commit": "b"}).add(row | {"n": 3})
    content = json.loads(path.read_text())
    assert content["commit"] == "b" and [row["commit"] for row in content["rows"]] == ["a", "a", "b"]
    Results.open(path, head | {"device": {"device": "two"}}).add(row)
    assert len(json.loads(path.read_text())["rows"]) == 1
