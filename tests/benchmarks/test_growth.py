"""The fits find what was planted, the cost model counts what is counted by hand, and docs/scaling.md is not stale."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.harness.peers import eager_logprobs
from benchmarks.scaling import cost_model as model
from benchmarks.scaling import cost_tables, growth
from benchmarks.scaling.cost_model import Device, Shape

pytest.importorskip("rlhf_kernels._C", reason="the sizes of tiles are the compiled plan's")

SIZES = [16, 32, 64, 128, 256, 512, 1024, 2048]
CPU = Device("a CPU", flops_per_s=100e9, bytes_per_s=10e9, logits_per_s=1e9, fresh_bytes_per_s=1e9)


def noisy(values, seed, noise=0.03):
    return np.asarray(values) * np.exp(np.random.default_rng(seed).normal(0, noise, len(values)))


# --- laws ---


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_an_exponent_is_found_and_no_break(exponent, seed):
    law = growth.fit_law(SIZES, noisy([3.0 * size**exponent for size in SIZES], seed))
    assert not law.breaks
    assert abs(law.exponents[0] - exponent) < max(0.05, 1.5 * law.intervals[0])
    assert law.intervals[0] < 0.1


@pytest.mark.parametrize("at", SIZES[2:-2])
@pytest.mark.parametrize("exponents", [(0.0, 1.0), (1.0, 2.0), (1.0, 0.0)])
def test_a_planted_break_is_found_where_it_is(at, exponents):
    before, after = exponents
    values = [size**before if size <= at else at ** (before - after) * size**after for size in SIZES]
    law = growth.fit_law(SIZES, noisy(values, at))
    assert law.breaks == (at,)
    assert law.exponents == pytest.approx(exponents, abs=0.15)
    assert f"to {at:,}, then" in str(law)


def test_two_breaks():
    values = [size if size <= 64 else 64.0 if size <= 256 else size / 4 for size in SIZES]
    assert growth.fit_law(SIZES, noisy(values, 1, 0.005)).breaks == (64, 256)


def test_noise_of_the_rows_hides_a_small_break():
    values = [size if size <= 128 else 128 * (size / 128) ** 1.4 for size in SIZES]
    assert growth.fit_law(SIZES, values).breaks == (128,)
    assert not growth.fit_law(SIZES, values, noise=0.5).breaks


def test_the_part_that_masking_leaves():
    counted = [1.0, 0.75, 0.5, 0.25, 0.125]
    line = growth.fit_line(counted, noisy([30 + 200 * c for c in counted], 2, 0.01))
    assert abs(line.fixed - 30) < max(line.fixed_interval, 3) and line.slope == pytest.approx(200, rel=0.1)


# --- a file of results: native costs a call and 64 rows at least, eager grows with N V ---


def row(sweep, contender, n=512, d=512, v=16384, masked=0.0, device=CPU):
    found = {"op": "linear_logprobs", "dtype": "float32", "n": n, "d": d, "v": v, "masked": masked, "sweep": sweep,
             "threads": 2, "contender": contender, "status": "measured"}  # fmt: skip
    shape = model.shape_of(found, device)
    ms = {what: 1e3 * model.predicted_s(device, found, what) for what in ("forward", "total")}
    found |= {f"{what}_ms": {"median": t * 1.01, "min": t, "max": t * 1.3} for what, t in ms.items()}
    if contender == "eager":
        found |= {
            "peak_forward_mib": 8 * n * v / 2**20,
            "peak_total_mib": model.eager_memory_bytes(shape, True) / 2**20,
        }
    return found


def results_of(device):
    rows = [row("n", c, n=n, device=device) for n in SIZES for c in model.WAYS]
    rows += [row("v", c, v=v, device=device) for v in (1024, 4096, 16384, 65536) for c in model.WAYS]
    rows += [row("masked", c, masked=m, device=device) for m in (0.0, 0.25, 0.5, 0.75) for c in model.WAYS]
    rows.append(row("n", "native", n=4096) | {"status": "not measured: time"})
    rows.append({"op": "kl_penalty", "dtype": "float32", "sweep": "", "contender": "native", "status": "measured"})
    machine = {"device": "a CPU", "threads": 2, "cpu_isa": "none"}
    return {"device": machine, "versions": {"torch": "2"}, "commit": "0", "measured": "never", "rows": rows}


@pytest.fixture(scope="module")
def results():
    return results_of(CPU)


def test_rows_to_laws(results):
    got = growth.series(results["rows"], "linear_logprobs", "float32", "native", "n", "forward_ms")
    assert got.sizes == SIZES and growth.fit_law(*got).breaks == (64,), "rows are padded to 64"
    assert growth.swept(results["rows"]) == [("linear_logprobs", "float32")]
    text = "\n".join(growth.law_table(results))
    assert "| linear_logprobs float32 | forward memory | N |  | 1.00 ± " in text
    assert "| native | forward time | N = 64 |" in "\n".join(growth.break_table(results))
    assert any("| native | 1 - masked | total time |" in line for line in growth.line_table(results))


@pytest.fixture
def evidence(tmp_path):
    machine = {"new memory written, GB/s": 1, "copied, read and written, GB/s": 10}
    found = {"device": {"device": "a CPU", "cpu_isa": "none"}, "machine": machine}
    (tmp_path / "evidence-any-name.json").write_text(json.dumps(found))
    return tmp_path


def test_products_of_native_may_have_a_rate_of_their_own(evidence):
    made_by = replace(CPU, native_flops_per_s=3 * CPU.flops_per_s, logits_per_s=float("inf"))
    found = results_of(made_by)
    device = cost_tables.calibrated(found, evidence)
    assert device.flops_per_s == pytest.approx(CPU.flops_per_s, rel=1e-6)
    assert device.native_flops_per_s == pytest.approx(3 * CPU.flops_per_s, rel=1e-6)
    text = "\n".join(cost_tables.checked(found, device))
    assert "100 GFLOP/s (300 native)" in text and " !" not in text


def test_the_model_recovers_the_rates_that_made_the_rows(results, evidence):
    device = cost_tables.calibrated(results, evidence)
    assert device.flops_per_s == pytest.approx(CPU.flops_per_s, rel=1e-6)
    assert device.logits_per_s == pytest.approx(CPU.logits_per_s, rel=1e-6)
    found = [ratio for _, _, ratio in model.checks(device, results["rows"])]
    assert len(found) > 80 and found == pytest.approx([1.0] * len(found))
    assert " !" not in "\n".join(cost_tables.checked(results, device))
    slower = replace(CPU, logits_per_s=CPU.logits_per_s / 4)
    assert " !" in "\n".join(cost_tables.checked(results, slower))


def test_evidence_of_another_machine_is_not_taken(evidence):
    this = {"device": "a CPU", "cpu_isa": "none", "threads": 2}
    assert cost_tables.evidence_rates(this, evidence) == {"fresh_bytes_per_s": 1e9, "bytes_per_s": 1e10}
    for other in ({"device": "another"}, {"cpu_isa": "more"}):
        assert cost_tables.evidence_rates(this | other, evidence) == {}


def test_a_picture_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    growth.draw(results, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert growth.INK in text and "<dc:date>" not in text and "<text" not in text


# --- counts ---


def sums(phases):
    return {name: sum(getattr(phase, name) for phase in phases) for name in ("flops", "bytes", "l2_bytes")}


def test_flops_are_those_of_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    n, d, v = 48, 32, 160
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    device, shape = model.gpu("H200"), Shape("linear_logprobs", n, d, v, 4)
    for total in (False, True):
        with FlopCounterMode(display=False) as counter:
            found = eager_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long))
            if total:
                found.sum().backward()
        counted = counter.get_total_flops()
        assert counted == sums(model.eager(device, shape, total))["flops"]
        recomputed = shape.products_flops if total else 0
        assert counted + recomputed == sums(model.native(device, shape, total))["flops"]


def test_products_of_every_op():
    device = model.gpu("H200")
    expected = {"linear_logprobs": (1, 4), "linear_kl": (2, 6), "linear_dpo_loss": (2, 5)}
    for op, (forward, total) in expected.items():
        shape = Shape(op, 256, 128, 4096)
        assert sums(model.native(device, shape, False))["flops"] == forward * shape.products_flops
        assert sums(model.native(device, shape, True))["flops"] == total * shape.products_flops
    kept = Shape("linear_dpo_loss", 256, 128, 4096, kept=1.0)
    assert sums(model.native(device, kept, True))["flops"] == 4 * kept.products_flops, "three and the reference's"


def test_bytes_by_hand():
    """One slice, one group: every operand is read once a GEMM."""
    n, d, v, device = 4, 16, 64, model.gpu("H200")
    shape = Shape("linear_logprobs", n, d, v)
    assert model.plan_of(device, shape, True)[:4] == (n, 1, 1, 1)
    h, w, z = 2 * n * d, 2 * v * d, 2 * n * v  # bf16
    states = 64 * n
    assert sums(model.native(device, shape, False)) == {
        "flops": 2 * n * d * v,
        "bytes": h + w + states,
        "l2_bytes": 4 * z,
    }
    recompute, weight, hidden, rounded = h + w + z, z + h + w, z + w + 4 * n * d, 8 * n * d
    expected = h + w + states + recompute + weight + hidden + rounded
    assert sums(model.native(device, shape, True))["bytes"] == expected
    assert model.eager_memory_bytes(shape, False) == 8 * n * v
    assert sums(model.eager(device, shape, False))["bytes"] == h + w + z + 6 * n * v + 8 * n * v


def test_the_plan_is_the_compiled_one():
    device, shape = model.gpu("H200"), Shape("linear_logprobs", 8192, 4096, 128256)
    plan = model.plan_of(device, shape, True)
    assert (plan.slices, plan.groups, plan.passes) == (math.ceil(128256 / 2048), math.ceil(128256 / 8192), 1)
    assert model.native_memory_bytes(device, shape, True) == plan.scratch_bytes + 4 * 8192 * 4096
    assert model.plan_of(CPU, Shape("linear_logprobs", 1, 512, 4096, 4), False).rows == model.ROW_STEP


def test_collectives_by_hand():
    device = model.gpu("H200")
    link, network = device.link_bytes_per_s, device.network_bytes_per_s
    assert model.all_reduce_s(device, 8e9, 8) == pytest.approx(2 * 7e9 / link)
    assert model.all_reduce_s(device, 8e9, 64) == pytest.approx(2 * (7e9 / link + 1e9 * 7 / 8 / network))
    shape = Shape("linear_logprobs", 1024, 256, 8192)
    assert model.data_parallel(device, shape, 8).backward_bytes == 2 * 8192 * 256
    parts = model.vocab_parallel(device, shape, 8)
    assert (parts.forward_bytes, parts.backward_bytes) == (16 * 8192, 4 * 8192 * 256)


# --- the page ---


def test_the_page_is_what_the_results_say():
    text = growth.DOC.read_text()
    assert growth.written(text, growth.load()) == text, "stale: run python -m benchmarks.scaling.growth"


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="must each be there once"):
        growth.replaced("nothing", "laws", [])
