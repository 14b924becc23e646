"""benchmarks/report, from a small folder of made-up results with planted holds, misses, wins and losses;
and the committed page, which must be what the committed results give."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.report import performance

ROOT = Path(__file__).resolve().parents[2]


def times(ms: float) -> dict:
    return {"median": ms, "min": 0.9 * ms, "max": 1.2 * ms}


def row(contender: str, forward: float | None, total: float, **more) -> dict:
    """A measured row; native takes 10 and 40 ms, bare GEMMs 9 and 36."""
    made = {"op": "linear_logprobs", "dtype": "float32", "n": 1024, "d": 1024, "v": 151936, "masked": 0.0}
    made |= {"model": "Qwen 3 0.6B", "sweep": "", "threads": 2, "contender": contender, "note": f"about {contender}"}
    made |= {"status": "measured", "rounds": 3, "total_ms": times(total), "gemm_fraction_total": 36 / total}
    made |= {"peak_total_mib": 100.0, "max_error": 1.5e-6, "hidden_gradient_error": 2e-6, "batch_invariant": False}
    if forward:
        made |= {"forward_ms": times(forward), "gemm_fraction_forward": 9 / forward, "peak_forward_mib": 50.0}
    if contender not in ("native", "bare GEMMs"):
        made["over_native"] = ({"forward": forward / 10} if forward else {}) | {"total": total / 40}
    return made | more


def bare(**more) -> dict:
    lacks = ("peak_total_mib", "peak_forward_mib", "max_error", "hidden_gradient_error", "batch_invariant")
    return {name: value for name, value in row("bare GEMMs", 9, 36, **more).items() if name not in lacks}


def native(**more) -> dict:
    return row("native", 10, 40, **{"peak_total_mib": 30.0, "peak_forward_mib": 20.0, "batch_invariant": True} | more)


def refused(contender: str, reason: str, **more) -> dict:
    kept = ("op", "dtype", "n", "d", "v", "masked", "model", "sweep", "threads", "contender", "note", "targets")
    made = row(contender, 1, 1, **more)
    return {name: made[name] for name in kept if name in made} | {"status": reason}


def pair(contender: str, total: float, **more) -> dict:
    made = {"op": "dpo_loss", "s": 4096, "contender": contender, "status": "measured", "max_error": 3e-7}
    over = {} if contender == "native" else {"over_native": {"forward": total / 2, "total": total / 2}}
    return made | {"forward_ms": times(total), "total_ms": times(total)} | over | more


def step(trainer: str, ms: float, **more) -> dict:
    made = {"trainer": trainer, "status": "measured", "dtype": "float32", "model": {"layers": 4, "vocab": 32000}}
    made |= {"batch": "4x256", "rounds": 5, "step_ms": times(ms), "over_rlhf": ms / 100, "peak_extra_mib": 10 * ms}
    return made | {"losses": [0.69, 0.6, 0.55], "max_loss_difference": 2e-7} | more


def part(trainer: str, ms: float, **more) -> dict:
    """Of a case; a rival takes 100 ms and 1,000 MiB where ours needs a tenth."""
    made = step(trainer, ms, case="up to the gradients", cpu_over_rlhf=1.25, first_loss_error=2e-9)
    if trainer.startswith("rlhf"):
        made |= {"targets": {"time": {"TRL 1.13.0": 0.4, "TRL 1.16.0": 0.1}, "memory": 0.25, "first_loss_error": 1e-6}}
    return made | more


def cpu() -> dict:
    rows = [
        bare(targets={"forward": 1.0}),  # missed: 10/9
        native(targets={"peak_total_mib": 68}),  # holds
        row("eager", 20, 44, peak_total_mib=1193.0, targets={"total": 1.3}),  # holds
        row("Liger", 30, 38, targets={"total": 1.0}),  # 40/38: missed, and beats native
        row("torch chunked, sum", None, 60, max_error=None),
        refused("TRL 1.13.0", "cannot run here: RuntimeError: a | b", targets={"total": 0.25}),
    ]
    for v in (32000, 256000):
        size = {"sweep": "v", "v": v, "model": ""}
        rows += [bare(**size), native(**size), row("eager", 20, 44, peak_total_mib=v / 128, **size)]
        rows.append(refused("CCE", "not on a CPU", **size))
    for masked in (0.0, 0.5):
        again = {name: value for name, value in row("native, unmasked", 10, 40).items() if "error" not in name}
        again |= {"sweep": "masked", "masked": masked, "targets": {"total": 0.7}}  # missed: it takes as long
        rows += [native(sweep="masked", masked=masked), again]
        rows.append(row("TRL 1.16.0", 30, 80, sweep="masked", masked=masked))
    kl = {"op": "linear_kl", "model": "Llama 3", "v": 128256}
    rows += [bare(**kl), native(**kl), row("TRL 1.16.0", 30, 90, **kl)]
    return {
        "device": {"device": "Some CPU", "threads": 2, "cpu_isa": "avx2"},
        "versions": {"rlhf_kernels": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "measured": "2026-11-21 17:40 UTC",
        "commit": "abc1234",
        "notes": {"max_error": "largest |value - fp64's|"},
        "rates": {"gemm": {"n": 512, "dtype": "float32", "tflops": 0.15}, "copy": {"gb_per_s": 9.5}},
        "rows": rows,
        "pair_losses": [pair("native", 2), pair("eager", 3), refused("Liger", "has none", op="dpo_loss") | {"s": 4096}],
        "steps": [
            step("rlhf", 100, max_loss_difference=None),
            step("TRL 1.16.0", 150),
            step("plain", 90),
            {"trainer": "TRL 1.13.0", "status": "not installed: trl"},
        ],
    }


def gpu() -> dict:
    """As benchmarks/on_gpu.py writes it."""
    lacks = ("model", "sweep", "threads")
    rows = [bare(), native(), row("CCE", 20, 80, max_error="nan"), refused("TRL", "out of memory")]
    rows.append(refused("all", "not measured: time", op="linear_kl"))
    rows = [{name: value for name, value in made.items() if name not in lacks} for made in rows]
    same = {name: value for name, value in cpu().items() if name not in ("rows", "pair_losses", "steps")}
    stages = {"native_tests": {"passed": 800, "failed": 3}, "native": {"status": "done"}}
    return same | {"device": {"device": "Some GPU", "memory_mib": 81920}, "rates": None, "rows": rows, "stages": stages}


def written(tmp_path: Path, **files: dict) -> str:
    results = tmp_path / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "evidence-of-something.json").write_text("{}")  # other results live beside them
    for name, content in files.items():
        (results / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))
    (tmp_path / "docs").mkdir(exist_ok=True)
    (tmp_path / "docs/performance.md").write_text("# Performance\n")
    performance.write(results, tmp_path / "docs")
    return (tmp_path / "docs/performance.md").read_text()


def line_of(page: str, *words: str) -> str:
    (found,) = [line for line in page.splitlines() if line.startswith("|") and all(word in line for word in words)]
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    return written(folder, cpu_avx2=cpu(), gpu_some=gpu()), folder / "docs"


def test_every_contender_has_a_line_with_its_error(page):
    text, _ = page
    table = text.split("**float32, Qwen 3 0.6B, 1024x1024x151936**")[1].split("\n### `linear_kl`")[0]
    names = re.findall(r"^\| \**(.+?)\**(?: ▲.*?|: .*?)? \|", table, re.M)
    assert names[2:8] == ["bare GEMMs", "native", "Liger", "eager", "torch chunked, sum", "TRL 1.13.0"]
    line = "| eager | 2.00 | 1.10 | 20.0 / 44.0 | 45% / 82% | 0.90–1.20 | 50 / 1,193 | 1.5e-06 | 2.0e-06 | no |"
    assert line_of(table, "eager") == line
    assert "no value per token" in line_of(table, "torch chunked, sum")
    assert "TRL 1.13.0: cannot run here: RuntimeError: a \\| b |" in line_of(table, "TRL 1.13.0")
    assert "| nan |" in line_of(text, "CCE", "2.00")
    assert "out of memory" in line_of(text, "TRL: ")
    assert "all: not measured: time" in text
    assert "about Liger" in text and "about TRL 1.13.0" in text


def test_machine_versions_commit_and_date_are_said(page):
    text, _ = page
    for words in ("## Some CPU\n", "threads 2; cpu isa avx2", "commit abc1234", "measured 2026-11-21", "trl 1.16.0"):
        assert words in text
    assert "0.15 TFLOP/s" in text and "## Some GPU\n" in text and "memory mib 81920" in text
    assert "native_tests: 800 passed, 3 failed" in text


def test_a_table_of_fewer_than_five_turns_says_so(page, tmp_path):
    assert "151936**, 3 turns" in page[0]
    rows = [row | {"rounds": 5} for row in cpu()["rows"]]
    assert "5 turns" not in written(tmp_path, cpu=cpu() | {"rows": rows, "steps": []})


def test_what_nobody_measured_is_said(page, tmp_path):
    assert "Missing" not in page[0]
    assert "Missing, until somebody measures it: a GPU (" in written(tmp_path, cpu=cpu())


def test_what_stands_above_the_results_stays(page):
    assert page[0].startswith("# Performance\n" + performance.BEGIN)


def test_targets_hold_or_are_missed(page):
    table = page[0].split("### Targets")[1].split("\n#")[0]
    assert "2 hold, 4 missed." in table
    assert "| forward against bare GEMMs | 1.111 | ≤ 1 |" in line_of(table, "against bare GEMMs", "**MISSED** |")
    assert "| total against Liger | 1.053 | ≤ 1 |" in line_of(table, "Liger", "**MISSED** |")
    assert "| total against eager | 0.909 | ≤ 1.3 |" in line_of(table, "eager", "holds")
    assert "30.0" in line_of(table, "peak total mib", "holds")
    assert "| total against native, unmasked | 1.000 | ≤ 0.7 |" in line_of(table, "50% masked", "**MISSED**")
    assert "cannot run here" in line_of(table, "TRL 1.13.0")


def only(rows: list[dict], **more) -> dict:
    return cpu() | {"rows": rows, "pair_losses": [], "steps": []} | more


def test_a_target_may_be_the_larger_budgets_or_a_part_of_anothers_memory(tmp_path):
    rows = [bare(), native(), row("native, larger budget", 10, 36)]
    targets = {"total": 0.4, "total_larger_budget": 0.45, "peak_total_mib": 0.2}
    rows.append(row("Liger", 30, 80, targets=targets))
    table = written(tmp_path, cpu=only(rows)).split("### Targets")[1]
    assert "| total against Liger | 0.500 | ≤ 0.4 |" in line_of(table, "| total against", "**MISSED** |")
    assert "| 0.450 | ≤ 0.45 |" in line_of(table, "total larger budget against Liger", "| holds |")
    assert "| 0.300 | ≤ 0.2 |" in line_of(table, "peak total mib against Liger", "**MISSED** |")


def test_who_beats_native_is_marked_and_counted(page):
    text, _ = page
    cpu_part, gpu_part = text.split("## Some GPU")
    assert "| Liger ▲ beats native: total | 3.00 | 0.95 |" in text
    assert text.count("▲ beats native:") == 1
    assert "forward in 7 of 7, total in 6 of 7, memory in 6 of 6." in cpu_part
    assert "- `linear_logprobs` float32 Qwen 3 0.6B, 1024x1024x151936, total: Liger, 0.95 of native's" in cpu_part
    assert "is not beaten" not in gpu_part
    assert "| plain ▲ beats rlhf: time, memory | 0.90 |" in text


def test_what_native_could_not_do_is_not_beaten(tmp_path):
    text = written(tmp_path, cpu=only([refused("native", "broken"), row("eager", 20, 80)]))
    assert "is beaten" not in text and "| **native**: broken |" in text


@pytest.mark.parametrize(("mib", "ratio"), [(24.0, "0.8"), (0.0, "0")])
def test_less_memory_is_a_win_too(tmp_path, mib, ratio):
    text = written(tmp_path, cpu=only([native(), row("eager", 20, 80, peak_total_mib=mib)]))
    assert "| eager ▲ beats native: memory |" in text and f"memory: eager, {ratio} of native's" in text


def test_pairs_and_steps(page):
    text, _ = page
    assert "| `dpo_loss`, S = 4096 | eager | 1.50 | 1.50 | 0.90–1.20 | 3.0e-07 |" in text
    assert "Liger: has none" in text
    assert "| TRL 1.16.0 | 1.50 | 0.90–1.20 | 1,500 | 2.0e-07 |" in text
    assert "TRL 1.13.0: not installed: trl" in text


def parts(dtype: str = "bfloat16", **of_ours) -> list[dict]:
    """Ours takes 0.2 of the older TRL's time and of the newer one's, and 0.3 of the leaner one's memory."""
    rows = [part("rlhf", 100, peak_extra_mib=600, judged=dtype == "bfloat16", **of_ours), part("TRL 1.13.0", 500)]
    rows += [part("TRL 1.16.0", 500, peak_extra_mib=2000), part("plain", 50, max_loss_difference=None)]
    return [row | {"dtype": dtype} for row in rows]


def verdicts_of(text: str, case: str) -> list[str]:
    targets = text.split("### Targets")[1].split("\n#")[0]
    return [line.split(" | ", 1)[1] for line in targets.splitlines() if f"{case}, bfloat16, rlhf |" in line]


def test_a_case_has_a_table_and_targets_of_its_own(tmp_path):
    variant = part("rlhf, share_prefix", 80, peak_extra_mib=400) | {"dtype": "bfloat16"}
    whole = cpu()["steps"]
    text = written(tmp_path, cpu=cpu() | {"steps": [*parts(), variant, *whole]})
    before, table = text.split("### up to the gradients")
    assert "| TRL 1.16.0 | 1.50 | 0.90–1.20 | 1,500 | 2.0e-07 |" in before.split("### Whole training steps")[1]
    assert "bfloat16; model: " in table
    assert "| rlhf, share_prefix | 0.80 | 0.90–1.20 | 400 | 2.0e-07 |  | 2.0e-09 |" in table, "it does not beat itself"
    assert "| plain ▲ beats rlhf: time, memory | 0.50 |" in table
    assert verdicts_of(text, "up to the gradients") == [
        "time against TRL 1.13.0 | 0.200 | ≤ 0.4 | 2.0e-07 | holds |",
        "time against TRL 1.16.0 | 0.200 | ≤ 0.1 | 2.0e-07 | **MISSED** |",
        "extra memory against the leaner of them | 0.300 | ≤ 0.25 | 2.0e-07 | **MISSED** |",
        "first loss, from log 2 | 2.0e-09 | ≤ 1e-06 | 2.0e-07 | holds |",
    ]
    assert "7 hold, 7 missed." in text  # 2 and 4 of ops, 2 and 2 of rlhf, 3 and 1 of its variant


def test_steps_of_today_have_targets_on_their_gradients(tmp_path):
    """As benchmarks/steps/track.py writes them."""
    targets = {"gradients": {"TRL 1.16.0": 0.6, "TRL 1.16.0, fused": 1.0}, "memory": 0.25, "first_loss_error": 1e-6}
    ours = part("rlhf", 100, case="steps", note="a note", judged=True) | {"targets": targets}
    rows = [ours | {"gradients_ms": times(50), "gradients_over_rlhf": 1.0, "dtype": "bfloat16"}]
    rows.append(part("TRL 1.16.0", 150, case="steps") | {"gradients_ms": times(125), "gradients_over_rlhf": 2.5})
    rows.append(part("TRL 1.16.0, fused", 90, case="steps", peak_extra_mib=10) | {"gradients_ms": times(40)})
    text = written(tmp_path, cpu=only([], steps=rows))
    assert "time against TRL 1.16.0, fused | 1.250 | ≤ 1 | 2.0e-07 | **MISSED** |" in verdicts_of(text, "steps")
    assert "memory against the leaner of them | 0.667 |" in text, "of TRL as it is"
    assert verdicts_of(text, "steps")[0] == "time against TRL 1.16.0 | 0.400 | ≤ 0.6 | 2.0e-07 | holds |"
    assert "a note" in text and "| TRL 1.16.0 | 1.50 | 0.90–1.20 | 1,500 | 2.0e-07 | 2.50 | 2.0e-09 |" in text


def test_targets_of_bf16_are_not_judged_in_fp32_but_shown(tmp_path):
    text = written(tmp_path, cpu=only([], steps=parts("float32")))
    assert "1 hold, 0 missed." in text
    line = line_of(text, "time against TRL 1.16.0")
    assert line.endswith("| 0.200 | ≤ 0.1 | 2.0e-07 | not judged in float32 |")
    assert line_of(text, "| first loss, from log 2 | 2.0e-09").endswith("| holds |")


def test_a_rival_or_ours_that_was_not_measured_leaves_its_target_open(tmp_path):
    lost = {"status": "not installed: trl"}
    without = [row | (lost if row["trainer"] == "TRL 1.13.0" else {}) for row in parts()]
    text = written(tmp_path / "rival", cpu=only([], steps=without))
    assert line_of(text, "time against TRL 1.13.0").endswith("|  | ≤ 0.4 | 2.0e-07 | not measured |")
    assert "| 0.300 | ≤ 0.25 |" in line_of(text, "leaner")
    text = written(tmp_path / "ours", cpu=only([], steps=parts(status="cannot run here: a | b")))
    assert "0 hold, 0 missed." in text
    assert "cannot run here: a \\| b |" in line_of(text, "time against TRL 1.16.0")


@pytest.mark.parametrize("where", ["rows", "pair_losses", "steps"])
def test_a_table_without_errors_is_not_printed(tmp_path, where):
    results = cpu() | {"rows": [], "pair_losses": [], "steps": [], where: cpu()[where]}
    for measured in results[where]:
        measured.pop("max_error", None)
        measured.pop("max_loss_difference", None)
    with pytest.raises(ValueError, match="so not printed: "):
        written(tmp_path, cpu=results)


def test_pictures_are_those_of_the_page_small_and_the_same_twice(page, tmp_path):
    text, docs = page
    linked = re.findall(r"\]\(images/(.+?)\)", text)
    assert linked == ["cpu-avx2.svg", "gpu-some.svg"]
    assert sorted(path.name for path in (docs / "images").iterdir()) == sorted(linked)
    again = tmp_path / "docs"
    assert written(tmp_path, cpu_avx2=cpu(), gpu_some=gpu()) == text
    for name in linked:
        picture = (docs / "images" / name).read_bytes()
        assert picture == (again / "images" / name).read_bytes()
        assert len(picture) < 60_000


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    """Its text; the bytes of pictures depend on matplotlib's version, so of them only that they are there."""
    committed = (ROOT / "docs/performance.md").read_text()
    (tmp_path / "performance.md").write_text(committed)
    performance.write(ROOT / "benchmarks/results", tmp_path)
    assert (tmp_path / "performance.md").read_text() == committed, "stale: run python -m benchmarks.report"
    for name in re.findall(r"\]\(images/(.+?)\)", committed):
        assert (ROOT / "docs/images" / name).is_file(), name
