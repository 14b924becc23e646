"""benchmarks/: the truth that errors are told against, the peers, and what becomes of a job's rows."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import conftest as suites
from benchmarks.harness import measuring, overlays
from benchmarks.harness.jobs import ROWS, Job, true_kl, true_logprobs
from benchmarks.harness.measuring import Clock, measure
from benchmarks.harness.pair_losses import WAYS, PairLossJob
from benchmarks.harness.peers import GPU_ALONE, RIVALS, Peer, capped, eager_logprobs, installed
from benchmarks.harness.record import Results

CPU = Clock(torch.device("cpu"))
TINY = partial(Job, dtype=torch.float32, backends=("native",), tile=64)
JOBS = {
    "linear_logprobs": TINY("linear_logprobs", 72, 32, 133, masked=0.5),
    "soft cap": TINY("linear_logprobs", 72, 32, 133, softcap=3.0),
    "linear_kl": TINY("linear_kl", 72, 32, 133),
    "linear_dpo_loss": TINY(
        "linear_dpo_loss", 72, 32, 133, sequences=(4, 18), pairs_per_response=2, budgets_mib={"larger": 100}
    ),
    "grpo": TINY("grpo", 72, 32, 133, sequences=(4, 18)),
}


def rows_of(job, **options):
    """By contender, of one round, without those that compile."""
    quick = {"seconds": 0, "most_rounds": 1, "may_start": lambda peer: not peer.slow_start}
    return {row["contender"]: row for row in measure(job, CPU, **quick | options)}


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_truth_is_what_autograd_says_in_fp64(softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(11, 7, dtype=torch.float64)
    targets = torch.tensor([3, -100, 0, 10, 10])
    log_p = capped(hidden @ weight.T, softcap).log_softmax(-1)
    logprobs = torch.where(targets == -100, 0.0, log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0])
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    torch.testing.assert_close(true_logprobs(hidden.detach(), weight, targets, softcap), (logprobs.detach(), gradient))
    other, other_weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    log_q = capped(other @ other_weight.T, softcap).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    torch.testing.assert_close(true_kl(hidden.detach(), weight, other, other_weight, softcap), (kl.detach(), gradient))


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_peer_has_a_row(job):
    """Measured and close to the truth, or refused with a reason."""
    rows = rows_of(job)
    assert {peer.name for peer in RIVALS[job.op](job.device)} | {"native", "bare GEMMs"} <= set(rows)
    measured = {name for name, row in rows.items() if row["status"] == "measured"}
    assert {"native", "eager", "bare GEMMs", f"TRL {installed('trl')}"} <= measured
    for name in measured - {"bare GEMMs"}:
        row = rows[name]
        assert row["max_error"] < 1e-4 and row.get("hidden_gradient_error", 0) < 1e-4, row
        assert row["total_ms"]["min"] <= row["total_ms"]["median"] and row["gemm_fraction_total"] > 0
        assert name == "native" or row["over_native"]["total"] > 0
    assert all(row["status"] for row in rows.values())


def test_what_a_peer_cannot_do_is_said():
    rows = rows_of(JOBS["soft cap"])
    assert rows["torch chunked"]["status"] == "takes no soft cap"
    assert rows["verl"]["status"] == "runs on GPUs alone; takes no soft cap"
    assert rows["torch.compile"]["status"] == "not measured: time"
    missing = Peer("missing", lambda *inputs: overlays.beside("nowhere", "module"))
    raising = Peer("raising", lambda *inputs: 1 / 0)
    job = replace(JOBS["linear_logprobs"])
    job.choose_peers = lambda: [missing, raising, Peer("elsewhere", eager_logprobs, GPU_ALONE)]
    rows = rows_of(job)
    assert rows["missing"]["status"] == "not installed: build/peers/nowhere-*"
    assert rows["raising"]["status"] == "cannot run here: ZeroDivisionError: division by zero"
    assert rows["elsewhere"]["status"] == "runs on GPUs alone"


def test_how_long_a_step_will_take_counts_what_all_rows_share_once():
    """So that eager torch, which writes the head's gradient once whatever the rows, is not left out as too slow."""
    job, taken = TINY("linear_logprobs", 16 * ROWS, 8, 9), []
    job.make()

    class Pretended(Clock):
        def ms(self, run):
            taken.append(run.args[1])
            return 1e3 * (2.0 + taken[-1] / ROWS)

    clock, eager = Pretended(job.device), job.choose_peers()[1]
    assert measuring.expected_step_s(job, eager, clock, 3.0) == pytest.approx(2.0 + 16)
    assert taken == [ROWS, 2 * ROWS]
    assert measuring.expected_step_s(job, eager, clock, 1.0) == pytest.approx(16.0)
    assert measuring.expected_step_s(job, eager, clock, 30.0) == pytest.approx(16 * 30.0)
    assert taken == [ROWS, 2 * ROWS], "neither what is short nor what is hopeless is asked again"


def test_who_runs_before_whom_changes_from_turn_to_turn():
    """Or one contender would always find the caches as the same other one left them."""
    runs = {name: (None, lambda: None) for name in ("bare GEMMs", "native", "eager", "compiled")}
    turns, taken = measuring.Turns(JOBS["linear_logprobs"], CPU, runs, {}), []
    turns.take = taken.append
    assert turns.measure(0.0, 1.0, 20, measuring.in_a_loop) == 20
    orders = [tuple(taken[k : k + 4]) for k in range(0, len(taken), 4)]
    assert all(set(order) == set(runs) and order[-1] == "native" for order in orders)
    assert {order[-2] for order in orders} == set(runs) - {"native"}


def test_a_wrong_peer_shows():
    """In its error, in its gradient's, and where its bits depend on the batch."""

    def wrong(hidden, weight, targets):
        return eager_logprobs(hidden, weight, targets) * (1 + 1e-3 * (len(hidden) > ROWS))

    job = replace(JOBS["linear_logprobs"])
    job.choose_peers = lambda: [Peer("wrong", wrong)]
    row = rows_of(job)["wrong"]
    assert row["max_error"] > 1e-3 and row["hidden_gradient_error"] > 5e-4 and row["batch_invariant"] is False


@pytest.mark.parametrize("op", WAYS)
def test_pair_losses(op):
    rows = rows_of(PairLossJob(op, 64))
    assert rows["native"]["max_error"] < 1e-5 and rows["eager"]["over_native"]["forward"] > 0


def test_peak_memory_on_a_cpu():
    """A process that holds the logits and their gradients holds more than one that does not."""
    job = TINY("linear_logprobs", 512, 64, 60000, rivals=("eager",))
    rows = rows_of(job, peaks=True)
    logits_mib = 4 * 512 * 60000 / 2**20
    assert rows["eager"]["peak_total_mib"] > 1.8 * logits_mib > logits_mib / 2 > rows["native"]["peak_total_mib"]


def test_an_op_whose_tests_fail_is_not_measured(tmp_path, monkeypatch):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert 1 == 2\n")
    (tmp_path / "test_green.py").write_text("def test_green():\n    pass\n")
    red, green = "test_red.py", "test_green.py"
    monkeypatch.setattr(suites, "TESTS", tmp_path)
    monkeypatch.setattr(suites, "TESTS_OF", {"red": [green, red], "green": [green]})
    monkeypatch.setattr(suites, "STAMPS", tmp_path / "stamps")
    assert "assert 1 == 2" in suites.failing_tests("red")
    assert suites.failing_tests("green") == ""
    (tmp_path / "test_green.py").unlink()
    suites.failing_tests.cache_clear()
    assert suites.failing_tests("green") == "", "it is remembered, file by file"
    assert "assert 1 == 2" in suites.failing_tests("red")


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


def test_rows_of_two_hosts_stand_beside_each_other(tmp_path):
    results = Results(tmp_path / "hosts.json", {"commit": "abc"})
    for host, ms in (("DPO", 1.0), ("SFT", 2.0), ("DPO", 3.0)):
        results.add({"host": host, "ms": ms})
    assert [(row["host"], row["ms"]) for row in json.loads(results.path.read_text())["rows"]] == [
        ("SFT", 2.0),
        ("DPO", 3.0),
    ]
