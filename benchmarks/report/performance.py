"""docs/performance.md and its pictures from benchmarks/results/cpu*.json and gpu*.json.

A file of results is what one run measured on one machine: `rows` of contenders that took turns, op by op and shape by
shape; where there are any, `pair_losses` (ops on one number per sequence) and `steps` of training.
"""

import json
from pathlib import Path

from benchmarks.harness.measuring import LEAST_TURNS
from benchmarks.report.formatting import both, cell, error_of, grid, nats, percent, short, spread
from benchmarks.report.pictures import draw_headline
from benchmarks.report.rows import (
    NATIVE,
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
    tables_of,
    wins,
)
from benchmarks.report.targets import FIRST_LOSS, target_table

FRACTIONS = ("gemm_fraction_forward", "gemm_fraction_total")
BEGIN = "<!-- written by python -m benchmarks.report; what stands above is not -->"

# --- comparisons ---


def mark(row: dict, native: dict | None) -> str:
    better = wins(row, native)
    return f" ▲ beats {NATIVE}: {', '.join(better)}" if better else ""


def best_peers(table: Table, native: dict) -> dict[str, tuple[float, str]]:
    """In forward, total and memory, the best peer's part of native's, and its name."""
    ratios: dict[str, list[tuple[float, str]]] = {"forward": [], "total": [], "memory": []}
    for row in filter(is_peer, measured(table)):
        for what, known in ratios.items():
            ratio = mib_over(row, native) if what == "memory" else over_native(row, native, what)
            if ratio is not None:
                known.append((ratio, row["contender"]))
    return {what: min(known) for what, known in ratios.items() if known}


def summary(tables: list[Table]) -> list[str]:
    """In how many comparisons the best peer is beaten; and every one in which it is not."""
    counts, lost = {"forward": [0, 0], "total": [0, 0], "memory": [0, 0]}, []
    for table in tables:
        native, row = of(table, NATIVE), table[0]
        where = f"`{row['op']}` {row['dtype']} {name_of(row)}" if "n" in row else f"`{row['op']}` S = {row['s']}"
        if native is None:  # the table says why
            continue
        for what, (ratio, peer) in best_peers(table, native).items():
            counts[what][0] += ratio >= 1.0
            counts[what][1] += 1
            if ratio < 1.0:
                lost.append(f"- {where}, {what}: {peer}, {ratio:.3g} of native's")
    words = [f"{what} in {won} of {out_of}" for what, (won, out_of) in counts.items() if out_of]
    lines = [f"The best peer of a table, eager torch included, is beaten: {', '.join(words)}.", ""] if words else []
    return lines + folded(f"It is not beaten in {len(lost)}:", lost)


# --- tables ---


def few_turns(table: Table) -> str:
    """A word to the table of an earlier run."""
    turns = min((row["rounds"] for row in measured(table) if "rounds" in row), default=LEAST_TURNS)
    return f", {turns} turns" if turns < LEAST_TURNS else ""


def contender_table(table: Table) -> list[str]:
    native, lines = of(table, NATIVE), []
    for row in in_order(table, native):
        name = f"**{row['contender']}**" if is_ours(row) else cell(row["contender"])
        if row["status"] != "measured":
            lines.append([f"{name}: {cell(row['status'])}", *[""] * 9])
            continue
        same = row.get("batch_invariant")
        lines.append(
            [
                name + mark(row, native),
                *(short(over_native(row, native, what)) for what in ("forward", "total")),
                " / ".join(short(median(row, what)) or "–" for what in ("forward", "total")),
                both(row, FRACTIONS, percent),
                spread(row.get("total_ms")),
                both(row, ("peak_forward_mib", "peak_total_mib"), lambda mib: "" if mib is None else f"{mib:,.0f}"),
                error_of(row),
                nats(row.get("hidden_gradient_error")),
                "" if same is None else "yes" if same else "no",
            ]
        )
    head = "contender, forward × native, total × native, ms: forward / total, of the GEMMs' rate, spread, "
    head += "extra MiB: forward / total, error in nats, gradient error, same bits"
    return grid(head.split(", "), lines)


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
            name = row["contender"] + mark(row, native)
            lines.append([*start, name, *ratios, spread(row.get("total_ms")), error_of(row)])
    head = ["op", "contender", "forward × native", "total × native", "spread", "error in nats"]
    return ["### Losses of pairs", "", *grid(head, lines, 2)] if lines else []


def step_table(steps: Table) -> list[str]:
    """Training steps of one case, or whole ones."""
    first, able, lines = steps[0], measured(steps), []
    unjudged = [step["trainer"] for step in able if step.get("max_loss_difference") is None]
    if len(unjudged) > 1:  # one of them is what the others differ from
        raise ValueError(f"measured without a difference of losses, so not printed: {', '.join(unjudged)}")
    ours_mib = next((step["peak_extra_mib"] for step in able if step["trainer"] == "rlhf"), 0.0)
    for step in steps:
        if step["status"] != "measured":
            lines.append([f"{step['trainer']}: {cell(step['status'])}", *[""] * 6])
            continue
        over = step.get("over_rlhf", 1.0)
        better = ["time"] if over < 1.0 else []
        better += ["memory"] if step["peak_extra_mib"] < ours_mib else []
        beats = f" ▲ beats rlhf: {', '.join(better)}" if better and not step["trainer"].startswith("rlhf") else ""
        difference = nats(step.get("max_loss_difference")) or "what the others differ from"
        line = [f"{step['trainer']}{beats}", short(over), spread(step["step_ms"]), short(step["peak_extra_mib"])]
        lines.append([*line, difference, short(step.get("gradients_over_rlhf")), nats(step.get("first_loss_error"))])
    model = ", ".join(f"{name} {value}" for name, value in first["model"].items())
    about = f"{first['dtype']}; model: {model}; batch: {first['batch']}{few_turns(steps)}."
    note = [first["note"], ""] if "note" in first else []
    head = ["trainer", "a step × rlhf", "spread", "extra MiB", "largest difference of losses", "its gradients × rlhf"]
    head.append(FIRST_LOSS)
    return [f"### {first.get('case', 'Whole training steps')}", "", about, "", *note, *grid(head, lines)]


def folded(heading: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{heading}</summary>", "", *lines, "", "</details>", ""] if lines else []


# --- the page ---


def heading(results: dict) -> list[str]:
    device, rates = results["device"], results.get("rates") or {}
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in device.items() if name != "device"]
    facts.append(", ".join(f"{name} {version}" for name, version in results["versions"].items() if version))
    tests = [(name, one) for name, one in results.get("stages", {}).items() if "passed" in one]
    facts += [f"{name}: {one['passed']} passed, {one['failed']} failed" for name, one in tests]
    facts += [f"measured {results['measured']}", f"commit {results['commit']}"]
    if "gemm" in rates:
        facts.append(f"a large {rates['gemm'].get('dtype', '')} GEMM {short(rates['gemm']['tflops'])} TFLOP/s")
    if "copy" in rates:
        facts.append(f"a copy {short(rates['copy']['gb_per_s'])} GB/s")
    return [f"## {device['device']}", "", "; ".join(facts) + ".", ""]


def section(results: dict, stem: str, images: Path) -> list[str]:
    """One machine's part of the page."""
    rows, pairs, steps = results["rows"], results.get("pair_losses", []), results.get("steps", [])
    tables = sorted(tables_of(rows), key=lambda table: bool(table[0].get("sweep")))
    plain = [table for table in tables if not table[0].get("sweep")]
    lines = heading(results) + summary(tables + tables_of(pairs, ("op", "s")))
    if draw_headline(tables, images / f"{stem}.svg"):
        lines += [f"![Time and peak extra memory of forward plus backward at one shape](images/{stem}.svg)", ""]
    lines += target_table(tables, steps)
    ops = list(dict.fromkeys(table[0]["op"] for table in plain))
    for op in ops:
        lines += [f"### `{op}`", ""]
        for table in (table for table in plain if table[0]["op"] == op):
            row = table[0]
            commit = row.get("commit", results["commit"])
            earlier = "" if commit == results["commit"] else f", commit {commit}"
            lines += [f"**{row['dtype']}, {name_of(row)}**{earlier}{few_turns(table)}", "", *contender_table(table)]
    lines += pair_table(pairs)
    for table in sorted(tables_of(steps, ("case",)), key=lambda table: "case" in table[0]):
        lines += step_table(table)
    notes = dict.fromkeys((row["contender"], row["op"], row["note"]) for row in [*rows, *pairs] if row.get("note"))
    return lines + folded("The contenders", [f"- {name}, `{op}`: {cell(note)}" for name, op, note in notes])


def write(results: Path, docs: Path) -> None:
    (docs / "images").mkdir(parents=True, exist_ok=True)
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("[cg]pu*.json"))}
    lines = []
    if not any(stem.startswith("gpu") for stem in files):
        lines += ["Missing, until somebody measures it: a GPU (`benchmarks/on_gpu.sh`).", ""]
    newest_first = sorted(files.items(), key=lambda file: file[1].get("measured", ""), reverse=True)
    for stem, content in newest_first:
        lines += section(content, stem, docs / "images")
    page = docs / "performance.md"
    above = page.read_text().partition(BEGIN)[0]
    page.write_text("\n".join([above + BEGIN, "", *lines]).rstrip() + "\n")
