"""How time and memory grow with N, V and D, and fall with masked rows: tables and a picture of the sweeps."""

import math
from pathlib import Path

from benchmarks.harness.measuring import BARE
from benchmarks.report.formatting import grid, short
from benchmarks.report.pictures import INK, PALE, colour, figure_of, save, title
from benchmarks.report.rows import NATIVE, Table, measured, of, tables_of

AXES = {"n": "N", "v": "V", "d": "D", "masked": "masked part", "threads": "threads"}
LEAST_MIB = 1.0  # less is pages and the allocator's own
SAME = ("op", "dtype", "sweep")  # what the rows of a sweep share, beside all sizes but one


def sweeps_of(rows: list[dict]) -> list[tuple[str, list[Table]]]:
    """A swept quantity, and a table for each of its sizes."""
    wanted = [row for row in rows if row.get("sweep") in AXES and row["op"] == "linear_logprobs"]
    sweeps = []
    for sweep in tables_of(wanted, SAME):
        axis = sweep[0]["sweep"]
        sweeps.append((axis, sorted(tables_of(sweep, (axis,)), key=lambda table: table[0].get(axis) or 0)))
    return sweeps


def value_of(row: dict | None, column: str) -> float | None:
    """A time is the least of its turns: other load only adds. None where there is nothing to compare."""
    value = row.get(column) if row else None
    if isinstance(value, dict):
        return value["min"]
    return value if value is not None and value >= LEAST_MIB else None


def slopes(axis: str, tables: list[Table], contender: str, column: str) -> list[str]:
    """Values, each with the exponent of its growth from the size before: log(value ratio) / log(size ratio)."""
    cells, before = [], None
    for table in tables:
        size, value = table[0][axis], value_of(of(table, contender), column)
        cell = short(value)
        if value and before and axis in ("n", "v", "d"):
            cell += f" ({math.log(value / before[1]) / math.log(size / before[0]):.2f})"
        cells.append(cell)
        before = (size, value) if value else None
    return cells


def sweep_table(axis: str, tables: list[Table]) -> list[str]:
    first = tables[0][0]
    names = [row["contender"] for row in measured([row for table in tables for row in table])]
    names = [name for name in dict.fromkeys(names) if name != BARE]
    head = [AXES[axis], *(f"{name}: {what}" for name in names for what in ("forward ms", "total ms", "MiB"))]
    columns = [[f"{table[0][axis]:.0%}" if axis == "masked" else f"{table[0][axis]:,}" for table in tables]]
    for name in names:
        columns += [slopes(axis, tables, name, column) for column in ("forward_ms", "total_ms", "peak_total_mib")]
    filled = [k for k, column in enumerate(columns) if any(column)]
    lines = [[column[at] for column in (columns[k] for k in filled)] for at in range(len(tables))]
    fixed = ", ".join(f"{AXES[name]} = {first[name]:,}" for name in ("n", "v", "d") if name != axis)
    text = f"**{first['op']} {first['dtype']} over {AXES[axis]}**, {fixed}"
    return [text, "", *grid([head[k] for k in filled], lines, 0)]


def growth_tables(files: dict[str, dict]) -> list[str]:
    """The sweeps of all files of results."""
    lines = []
    for results in files.values():
        device = results["device"]
        machine = f"{device['device']}, {device['threads']} threads, {device['cpu_isa']}"
        sweeps = sweeps_of(results["rows"])
        commits = {row.get("commit", results["commit"]) for _, tables in sweeps for table in tables for row in table}
        when = f", {results['measured']}" if commits == {results["commit"]} else ""  # rows of before keep their commit
        lines += [f"### {machine}", "", f"Commit {', '.join(sorted(commits))}{when}.", ""]
        for axis, tables in sweeps:
            lines += sweep_table(axis, tables)
    return lines or ["No file of results has swept rows yet: `make bench` writes them."]


def draw(results: dict, path: Path) -> None:
    panels = [
        ("forward + backward, ms", "n", "total_ms"),
        ("forward + backward, ms", "v", "total_ms"),
        ("peak extra memory, MiB", "v", "peak_total_mib"),
        ("forward + backward, ms", "masked", "total_ms"),
    ]
    sweeps = dict(sweeps_of(results["rows"]))
    figure, axes = figure_of(2, [3.0, 3.0])
    for panel, (text, axis, column) in zip(axes, panels, strict=True):
        tables = sweeps.get(axis, [])
        for contender in (NATIVE, "eager", BARE):
            points = [(table[0][axis], value_of(of(table, contender), column)) for table in tables]
            points = [point for point in points if point[1]]
            if points:
                shade = colour(contender)
                panel.plot(
                    *zip(*points, strict=True), "o-", color=shade, markersize=3.5, linewidth=1.4, label=contender
                )
        if axis == "masked":
            panel.set_ylim(bottom=0)
        else:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.minorticks_off()
            sizes = [table[0][axis] for table in tables]
            panel.set_xticks(sizes, [f"{size >> 10}k" if size >= 1024 else str(size) for size in sizes])
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        title(panel, text)
        panel.set_xlabel(AXES[axis], color=INK)
        panel.grid(color=PALE, linewidth=0.6)
    axes[0].legend(frameon=False, labelcolor=INK)
    save(figure, path)


def evidence_tables(files: list[dict]) -> list[str]:
    """Caches, pages and calls of a machine; measured once, by code that is gone from here."""
    lines: list[str] = []
    for evidence in files:
        machine = f"**{evidence['device']['device']}, {evidence['device']['cpu_isa']}**, one thread"
        lines += [f"{machine}, {evidence['measured']}.", ""]
        lines += grid(["", ""], [[what, f"{value:,}"] for what, value in evidence["machine"].items()])
        calls = evidence["calls"]
        lines += grid(list(calls[0]), [[str(value) for value in call.values()] for call in calls], 2)
    return lines
