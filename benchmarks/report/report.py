"""`python -m benchmarks.report.report`: docs/performance.md and its pictures from
benchmarks/results/cpu*.json and gpu*.json.

A file of results is what one run measured on one machine: `rows` of contenders that took turns, op by op and shape by
shape; where there are any, `pair_losses` (ops on one number per sequence) and whole `steps` of training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.heads import HEADS
from benchmarks.report import pictures
from benchmarks.report.pictures import (
    BARE,
    NATIVE,
    SWEPT,
    Table,
    in_order,
    is_ours,
    is_peer,
    measured,
    median,
    mib_over,
    name_of,
    of,
    over_native,
    short,
    sweeps_of,
    tables_of,
    wins,
)
from benchmarks.report.step_tables import step_tables, step_targets
from benchmarks.report.words import both, cell, grid, nats, percent, spread

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = {"n": "tokens", "v": "vocabulary", "d": "hidden size", "masked": "masked part"}
WORDS |= {"dtype": "dtype", "threads": "threads", "pairs_per_response": "pairs a response"}
INTRO = f"""# Performance

Written by `python -m benchmarks.report.report` from the `cpu*.json` and `gpu*.json` of `benchmarks/results`: how fast,
how exact and how frugal each op is beside the matrix products that it cannot do without ({BARE}), eager torch and other
packages, wins and losses alike.

How a ratio is made: all contenders of a table take turns in one process, so that whatever slows the machine slows
them all, in an order that is drawn anew for every turn; a time is the median of a contender's turns, a ratio is one
such median over another. Machines differ and milliseconds with them: ratios are what is claimed. Nearer to 1 than the
spread, a ratio is a tie.

- **× native**: time over that of this project's compiled kernels; above 1 the contender is slower. *Forward* runs
  without autograd; *total* is forward and backward, with fresh gradients of hidden states and head.
- **of the GEMMs' rate**: 100% is as fast as the bare matrix products of the same shape in the same turns. Those are
  torch's (`mm`); this project's are oneDNN's, which on some processors are twice as fast in fp32.
- **spread**: the fastest and the slowest turn of total, over the median.
- **extra MiB**: peak memory beyond inputs (and, in total, beyond the gradients), forward and total.
- **error**: the largest difference from fp64 on the same inputs, in nats (of the loss, where an op gives only that).
  **gradient error**: that of the gradient of the hidden states, |difference| / |gradient|.
- **same bits**: whether a row's result has the same bits in any batch.
- **{NATIVE}, larger budget** keeps all logits from forward to backward (`set_workspace_budget`): three GEMMs instead of
  four; of the KL, four instead of six. **{NATIVE}, least budget** has 8 MiB of scratch, where the default is 64.
- **▲ beats {NATIVE}** marks what another package does faster or in less memory. Who cannot do a case has a line that
  says why.
"""


LARGER, LEAST = f"{NATIVE}, larger budget", f"{NATIVE}, least budget"


def error_of(row: dict) -> str:
    """Of a measured row; a table without it is not printed."""
    if row["contender"] == BARE or row["contender"].endswith(", unmasked"):
        return ""  # yardsticks: bare GEMMs compute nothing that has a truth, unmasked rows are another case
    if row.get("max_error") is not None:
        return nats(row["max_error"])
    if row["contender"].endswith(", sum") and row.get("hidden_gradient_error") is not None:
        return "no value per token"  # its gradient is judged
    raise ValueError(f"measured without an error, so not printed: {row['contender']} of {row['op']}")


# --- comparisons ---


def mark(row: dict, native: dict | None) -> str:
    better = wins(row, native)
    return f" ▲ beats {NATIVE}: {', '.join(better)}" if better else ""


# --- sections ---


def found_for(what: str, row: dict, native: dict, table: Table) -> float | None:
    """What a target speaks of: native's part of a contender's time or memory, or its own memory."""
    if what in ("forward", "total"):
        return 1 / over if (over := over_native(row, native, what)) else None
    if what == "total_larger_budget":
        larger = of(table, LARGER)
        ours, theirs = larger and over_native(larger, native, "total"), over_native(row, native, "total")
        return ours / theirs if ours and theirs else None
    over = mib_over(row, native, what)
    return native.get(what) if row is native else 1 / over if over else None


def what_bounds(what: str, row: dict, native: dict, table: Table) -> str:
    """Of a time that misses its target: what the products alone, which native cannot do without, are of it."""
    bare = of(table, BARE)
    if bare is None or row is bare or what not in ("forward", "total"):
        return ""
    theirs, products = over_native(row, native, what), over_native(bare, native, what)
    return f", {BARE} alone take {products / theirs:.3f}" if theirs and products else ""


def targets(tables: list[Table], steps: list[dict]) -> list[str]:
    """What docs promise of this machine, held against what was measured."""
    lines, held, missed = [], 0, 0
    for table in tables:
        native = of(table, NATIVE)
        for row in table:
            for what, most in row.get("targets", {}).items():
                able = row["status"] == "measured" and native is not None
                found = found_for(what, row, native, table) if able else None
                if found is not None:
                    holds = found <= most
                    held, missed = held + holds, missed + (not holds)
                    verdict = "holds" if holds else f"**MISSED**{what_bounds(what, row, native, table)}"
                elif able:
                    verdict = "not measured"
                else:
                    verdict = cell(row["status"]) if native else f"no {NATIVE}"
                against = f" against {row['contender']}" if row is not native else ""
                said = f"`{row['op']}` {row['dtype']}, {name_of(row)}"
                number = "" if found is None else f"{found:.3f}" if found < 10 else short(found)
                error = error_of(native) if native else ""
                lines.append([said, what.replace("_", " ") + against, number, f"≤ {most:.4g}", error, verdict])
    for line, holds in step_targets(steps):
        held, missed = held + (holds is True), missed + (holds is False)
        lines.append(line)
    if not lines:
        return []
    head = ["what", "native, as a ratio or in MiB", "measured", "target", "error, nats", "verdict"]
    return ["### Targets", "", f"{held} hold, {missed} missed.", "", *grid(head, lines, 2)]


def other_budget(what: str, table: Table, native: dict) -> str:
    """What a budget does about a comparison that is lost with the default one."""
    larger, least = of(table, LARGER), of(table, LEAST)
    if what == "total" and larger:
        return f"; {NATIVE} with a larger budget, {over_native(larger, native, 'total'):.3g}"
    if what == "memory" and least:
        times = f"in {over_native(least, native, 'total'):.3g} of its time"
        return f"; {NATIVE} with the least budget, {mib_over(least, native):.3g} {times}"
    return ""


def summary(tables: list[Table]) -> list[str]:
    """In how many comparisons the best peer is beaten; and every one in which it is not."""
    counts, lost = {"forward": [0, 0], "total": [0, 0], "memory": [0, 0]}, []
    for table in tables:
        native, peers = of(table, NATIVE), [row for row in measured(table) if is_peer(row)]
        row = table[0]
        where = f"`{row['op']}` {row['dtype']} {name_of(row)}" if "n" in row else f"`{row['op']}` S = {row['s']}"
        if native is None:
            if peers:  # they did what native did not
                counts["total"][1] += 1
                why = next((row["status"] for row in table if row["contender"] == NATIVE), "not measured")
                lost.append(f"- {where}: {NATIVE} itself: {cell(why)}")
            continue
        for what, count in counts.items():
            if what != "memory":
                found = {row["contender"]: over_native(row, native, what) for row in peers}
            else:
                found = {row["contender"]: mib_over(row, native) for row in peers}
            found = {name: ratio for name, ratio in found.items() if ratio is not None}
            if not found:
                continue
            best = min(found, key=lambda name: found[name])
            count[1] += 1
            count[0] += found[best] >= 1.0
            if found[best] < 1.0:
                lost.append(
                    f"- {where}, {what}: {best}, {found[best]:.3g} of native's{other_budget(what, table, native)}"
                )
    said = [f"{what} in {won} of {out_of}" for what, (won, out_of) in counts.items() if out_of]
    if not said:
        return []
    lines = [f"The best peer of a table, eager torch included, is beaten: {', '.join(said)}."]
    if lost:
        lines += ["", f"<details><summary>It is not beaten in {len(lost)}:</summary>", "", *lost, "", "</details>"]
    return [*lines, ""]


def contender_table(table: Table) -> list[str]:
    native, lines = of(table, NATIVE), []
    for row in in_order(table, native):
        name = f"**{row['contender']}**" if is_ours(row) else cell(row["contender"])
        if row["status"] != "measured":
            lines.append([f"{name}: {cell(row['status'])}", *[""] * 8])
            continue
        same = row.get("batch_invariant")
        lines.append(
            [
                name + mark(row, native),
                short(over_native(row, native, "forward")),
                short(over_native(row, native, "total")),
                both(row, ("gemm_fraction_forward", "gemm_fraction_total"), percent),
                spread(row.get("total_ms")),
                both(row, ("peak_forward_mib", "peak_total_mib"), lambda mib: "" if mib is None else f"{mib:,.0f}"),
                error_of(row),
                nats(row.get("hidden_gradient_error")),
                "" if same is None else "yes" if same else "no",
            ]
        )
    head = ["contender", "forward, × native", "total, × native", "of the GEMMs' rate: forward / total", "spread"]
    head += ["extra MiB: forward / total", "error, nats", "gradient error", "same bits"]
    times = [
        f"{row['contender']} {short(median(row, 'forward')) or '–'} / {short(median(row, 'total')) or '–'}"
        for row in measured(table)
    ]
    rounds = next((row["rounds"] for row in measured(table) if "rounds" in row), None)
    turns = f", of {rounds} turns" if rounds else ""
    aside = f"<details><summary>Milliseconds</summary>Forward / total{turns}: {'; '.join(times)}.</details>"
    return [*grid(head, lines), *([aside, ""] if times else [])]


def value_of(row: dict, swept: str) -> str:
    value = row.get(SWEPT[swept])
    return f"{value:.0%}" if swept == "masked" else f"{value:,}" if isinstance(value, int) else str(value)


def sweep_table(sweep: list[Table]) -> list[str]:
    first, swept = sweep[0][0], sweep[0][0]["sweep"]
    rows = [row for table in sweep for row in in_order(table, of(table, NATIVE))]
    names = list(dict.fromkeys(row["contender"] for row in measured(rows)))
    lines = []
    for table in sweep:
        native = of(table, NATIVE)
        line = [
            value_of(table[0], swept),
            both(native or {}, ("gemm_fraction_forward", "gemm_fraction_total"), percent),
        ]
        for name in names:
            if (row := of(table, name)) is None:
                line.append("–")
                continue
            memory = f"{row['peak_total_mib']:,.0f} MiB" if row.get("peak_total_mib") is not None else ""
            parts = [short(over_native(row, native, "total")), memory, error_of(row)]
            line.append(" · ".join(part for part in parts if part) + (" ▲" if wins(row, native) else ""))
        lines.append(line)
    refused: dict[str, list[str]] = {}
    for table in sweep:
        for row in table:
            if row["status"] != "measured":
                refused.setdefault(f"{cell(row['contender'])}: {cell(row['status'])}", []).append(value_of(row, swept))
    for why, values in refused.items():
        lines.append([why + (f" ({', '.join(values)})" if len(values) < len(sweep) else ""), *[""] * (1 + len(names))])
    fixed = ", ".join(
        f"{WORDS[name]} {first[name]}"
        for name in ("n", "d", "v", "threads")
        if first.get(name) and name != SWEPT[swept]
    )
    dtype = "" if swept == "dtype" else f" {first['dtype']}"
    over = WORDS[SWEPT[swept]]
    head = [over, "native, of the GEMMs' rate: forward / total", *map(cell, names)]
    return [f"**`{first['op']}`{dtype} over {over}** ({fixed})", "", *grid(head, lines)]


def pair_table(rows: list[dict]) -> list[str]:
    """Ops on one number per sequence, all in one table."""
    lines = []
    for table in tables_of(rows, ("op", "s")):
        native = of(table, NATIVE)
        for row in in_order(table, native):
            start = [f"`{row['op']}`, S = {row['s']}"]
            if row["status"] != "measured":
                lines.append([*start, f"{row['contender']}: {cell(row['status'])}", *[""] * 4])
                continue
            ratios = [short(over_native(row, native, what)) for what in ("forward", "total")]
            lines.append(
                [*start, row["contender"] + mark(row, native), *ratios, spread(row.get("total_ms")), error_of(row)]
            )
    head = ["op", "contender", "forward, × native", "total, × native", "spread", "error, nats"]
    return ["### Losses of pairs", "", *grid(head, lines, 2)] if lines else []


def folded(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>", ""] if lines else []


def machine_title(device: dict) -> str:
    threads = f", {device['threads']} threads" if device.get("threads") else ""
    return device["device"] + threads + (f", {device['cpu_isa']}" if device.get("cpu_isa") else "")


def earlier(row: dict, results: dict) -> str:
    """The commit of a row that is not the file's."""
    commit = row.get("commit", results["commit"])
    return "" if commit == results["commit"] else f", commit {commit}"


def section(results: dict, stem: str, images: Path) -> list[str]:
    device, rows = results["device"], results["rows"]
    tables = tables_of(rows)
    tables.sort(key=lambda table: bool(table[0].get("sweep")))
    plain, sweeps = [table for table in tables if not table[0].get("sweep")], sweeps_of(tables)
    pairs, steps = results.get("pair_losses", []), results.get("steps", [])

    def picture(kind: str, says: str, drawn: Callable[[Path], bool]) -> list[str]:
        name = f"{stem}{kind}.svg"
        return [f"![{says}](images/{name})", ""] if drawn(images / name) else []

    more = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in device.items()
        if name not in ("device", "threads", "cpu_isa")
    ]
    versions = [f"{name} {version}" for name, version in results["versions"].items() if version]
    facts = [*more, ", ".join(versions), f"measured {results['measured']}", f"commit {results['commit']}"]
    rates = results.get("rates") or {}
    if "gemm" in rates:
        facts.append(f"a large {rates['gemm'].get('dtype', '')} GEMM {short(rates['gemm']['tflops'])} TFLOP/s")
    if "copy" in rates:
        facts.append(f"a copy {short(rates['copy']['gb_per_s'])} GB/s")
    lines = [f"## {machine_title(device)}", "", "; ".join(facts) + ".", ""]
    lines += summary(tables + tables_of(pairs, ("op", "s")))
    says = "Time and peak extra memory of forward plus backward at one shape"
    lines += picture("", says, lambda path: pictures.draw_headline(tables, path))
    lines += targets(tables, steps)
    says = "Forward plus backward of log-probs, shape by shape, in units of the bare GEMMs' time"
    lines += picture("-time", says, lambda path: pictures.draw_time(plain, path))
    says = "Part of the bare GEMMs' rate that is reached"
    lines += picture("-roofline", says, lambda path: pictures.draw_roofline(plain, path))
    op = None
    for table in sorted(plain, key=lambda table: [t[0]["op"] for t in plain].index(table[0]["op"])):
        row = table[0]
        lines += [f"### `{row['op']}`", ""] if row["op"] != op else []
        op = row["op"]
        lines += [f"**{row['dtype']}, {name_of(row)}**{earlier(row, results)}", "", *contender_table(table)]
    if sweeps:
        says = "Cells: total, × native · peak extra memory · error in nats; ▲ marks who beats native in time or memory."
        lines += ["### Sweeps", "", says, ""]
    over_v = [sweep for sweep in sweeps if sweep[0][0]["sweep"] == "v"]
    if over_v:
        says = "Peak extra memory over the size of the vocabulary"
        lines += picture("-memory", says, lambda path: pictures.draw_memory(over_v[0], path))
    for sweep in sweeps:
        lines += sweep_table(sweep)
    lines += pair_table(pairs)
    whole = step_tables(steps)
    says = "Losses, time and memory of whole training steps"
    lines += whole + (picture("-step", says, lambda path: pictures.draw_steps(steps, path)) if whole else [])
    notes = dict.fromkeys((row["contender"], row["op"], row["note"]) for row in [*rows, *pairs] if row.get("note"))
    lines += folded("The contenders", [f"- {name}, `{op}`: {cell(note)}" for name, op, note in notes])
    meanings = results.get("notes", {})
    return lines + folded("The columns of the JSON", [f"- `{name}`: {cell(said)}" for name, said in meanings.items()])


def missing(found: dict[str, dict]) -> list[str]:
    """What no committed file has measured; `found` by the files' stems."""
    lacks = []
    if not any(stem.startswith("gpu") for stem in found):
        lacks.append("a GPU (`benchmarks/on_gpu.sh`)")
    cpus = [results for stem, results in found.items() if stem.startswith("cpu")]
    if not any(results["device"].get("cpu_bf16") == "multiplied as bf16" for results in cpus):
        lacks.append("a CPU that multiplies bf16 (AVX512_BF16, AMX), for which the 16-bit targets are set")
    rows = [row for results in cpus for row in results["rows"] if row["status"] == "measured"]
    measured = {row.get("model") for row in rows if row["contender"] == NATIVE}
    heads = [model for model in HEADS if model not in measured]
    if heads:
        lacks.append(f"the heads of {', '.join(heads)}")
    return [f"Missing, until somebody measures it: {'; '.join(lacks)}.", ""] if lacks else []


def write(results: Path, docs: Path) -> None:
    (docs / "images").mkdir(parents=True, exist_ok=True)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("[cg]pu*.json"))}
    found = dict(sorted(found.items(), key=lambda file: file[1].get("measured", ""), reverse=True))  # newest first
    lines = [*INTRO.splitlines(), "", *missing(found)]
    for stem, content in found.items():
        lines += section(content, stem, docs / "images")
    (docs / "performance.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md and images/")
    options = parser.parse_args()
    write(options.results, options.docs)


if __name__ == "__main__":
    main()
