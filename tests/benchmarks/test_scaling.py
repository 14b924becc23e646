"""Growth is what was planted, the cost model counts what is counted by hand, and docs/scaling.md is not stale."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.harness.linear_logprobs import LinearLogprobs
from benchmarks.report.pictures import INK
from benchmarks.scaling import __main__ as page
from benchmarks.scaling import cost_model as model
from benchmarks.scaling import growth

SIZES = [16, 64, 256]


def row(contender, sweep, total_ms, mib, n=256, d=512, v=16384, masked=0.0):
    row = {"op": "linear_logprobs", "dtype": "float32", "n": n, "d": d, "v": v, "masked": masked, "sweep": sweep}
    row |= {"threads": 2, "contender": contender, "status": "measured", "peak_total_mib": mib}
    return row | {"total_ms": {"median": 1.2 * total_ms, "min": total_ms, "max": 2 * total_ms}}


@pytest.fixture(scope="module")
def results():
    """Native takes 1 ms and 0.01 ms a token; eager's time grows with N, its memory with N V."""
    rows = [row("native", "n", n, 0.5, n=n) for n in SIZES] + [row("eager", "n", 3.0 * n, n / 16, n=n) for n in SIZES]
    rows += [row("native", "v", v / 64, 16.0, v=v) for v in (2048, 8192)]
    rows += [row("native", "masked", 100 * (1 - masked), None, masked=masked) for masked in (0.0, 0.5)]
    rows += [row("eager", "n", 1, 1, n=1024) | {"status": "not measured: time"}]
    rows += [{"op": "kl_penalty", "dtype": "float32", "sweep": "", "contender": "native", "status": "measured"}]
    machine = {"device": "a CPU", "threads": 2, "cpu_isa": "none"}
    return {"device": machine, "versions": {"torch": "2"}, "commit": "0", "measured": "never", "rows": rows}


def test_tables_have_values_and_exponents(results):
    text = "\n".join(growth.growth_tables({"cpu-a": results}))
    assert "### a CPU, 2 threads, none" in text
    assert "**linear_logprobs float32 over N**, V = 16,384, D = 512" in text
    assert "| N | native: total ms | eager: total ms | eager: MiB |" in text, "what is under 1 MiB is left out"
    assert "| 16 | 16.0 | 48.0 | 1.00 |" in text
    assert "| 64 | 64.0 (1.00) | 192 (1.00) | 4.00 (1.00) |" in text
    assert "| 1,024 |  |  |  |" in text, "what was not measured leaves its cells open"
    assert "| 8,192 | 128 (1.00) | 16.0 (0.00) |" in text
    assert "| 50% | 50.0 |" in text
    assert growth.growth_tables({}) == ["No file of results has swept rows yet: `make bench` writes them."]


def test_a_picture_is_drawn(results, tmp_path):
    growth.draw(results, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert INK in text and "<dc:date>" not in text and "native" in text


def test_products_by_hand():
    head = model.Head("a head", 16, 64)
    assert model.products_s(4, 8, head, 0.5) == pytest.approx(4 * 2 * 8 * 16 * 64 / (0.5 * 989e12))
    assert model.native_extra_bytes(8, head) == 256 * 2**20 + 4 * 8 * 16
    text = "\n".join(model.op_table())
    flops = 2 * model.TOKENS * 4096 * 128256
    assert "| Llama 3 8B | linear_logprobs, 1 and 4 GEMMs |" in text
    assert f"{1e3 * LinearLogprobs.total_products * flops / (0.75 * 989e12):.1f} - " in text


def test_collectives_by_hand():
    link, network = 0.8 * 450e9, 0.8 * 50e9
    assert model.all_reduce_s(8e9, 8) == pytest.approx(2 * 7e9 / link)
    assert model.all_reduce_s(8e9, 64) == pytest.approx(2 * (7e9 / link + 1e9 * 7 / 8 / network))
    head, rows = model.Head("a head", 256, 8192), model.TOKENS * 8
    data, vocab = model.parallel_ways(head, 8)
    assert data.sent_bytes == 2 * 8192 * 256 and data.sending_s == model.all_reduce_s(data.sent_bytes, 8)
    assert vocab.sent_bytes == 16 * rows + 4 * rows * 256
    assert [way.way for way in model.parallel_ways(head, 64)] == [
        "data-parallel", "vocab-parallel in a node, data-parallel across", "vocab-parallel over all"
    ]  # fmt: skip


def test_the_page_is_what_the_results_say():
    text = page.PAGE.read_text()
    assert page.written(text, page.load()) == text, "stale: run python -m benchmarks.scaling"


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="must each be there once"):
        page.replaced("nothing", "laws", [])
