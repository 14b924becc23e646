"""The pictures of docs/performance.md, and what rows of results say to them and to report.py.

They are transparent, in colours that are readable on white and on black.

Text stays text, in the reader's sans-serif: as paths it made files of 290 KB where these have 60. Panels are laid out
for DejaVu Sans, which is among the widest, so that other fonts fit too. The same results give the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

BARE, EAGER, NATIVE = "bare GEMMs", "eager", "native"
HEADLINE = {"op": "linear_logprobs", "n": 1024, "d": 1024, "v": 151936}  # of the README's picture
CUT = 4.0  # bars longer than so many of native's are cut, or the others could not be told apart
# What the rows of a table share.
KEY = ("op", "dtype", "n", "d", "v", "s", "t", "pairs_per_response", "masked", "softcap", "model", "sweep", "threads")
SWEPT = {"n": "n", "v": "v", "d": "d", "masked": "masked", "dtype": "dtype", "threads": "threads"}
SWEPT |= {"pairs": "pairs_per_response"}
INK, PALE = "#7d8590", "#7d859055"  # readable on white and on black
COLOURS = {  # by the first words of a name: versions of a package are drawn alike
    BARE: "#9aa4b0",
    NATIVE: "#2f81f7",
    "triton": "#3fb950",
    "rlhf": "#2f81f7",
    EAGER: "#d29922",
    "plain": "#d29922",
    "torch": "#db6d28",
    "TRL": "#a371f7",
    "Liger": "#e667ac",
    "CCE": "#2ba8b4",
    "best peer": "#a371f7",
}
Table = list[dict]  # rows of one op at one shape, which took turns


def colour(name: str) -> str:
    return next((shade for start, shade in COLOURS.items() if name.startswith(start)), INK)


# --- what rows say ---


def short(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 10:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def is_ours(row: dict) -> bool:
    return row["contender"].partition(",")[0] in (NATIVE, "triton")


def is_peer(row: dict) -> bool:
    return not is_ours(row) and row["contender"] != BARE


def measured(table: Table) -> Table:
    return [row for row in table if row["status"] == "measured"]


def of(table: Table, contender: str) -> dict | None:
    """The row of one contender, if it was measured."""
    return next((row for row in measured(table) if row["contender"] == contender), None)


def median(row: dict, what: str) -> float | None:
    times = row.get(f"{what}_ms")
    return times["median"] if times else None


def over_native(row: dict, native: dict | None, what: str) -> float | None:
    if row is native:
        return 1.0 if median(row, what) else None
    if what in row.get("over_native", {}):
        return row["over_native"][what]
    if native is None or not median(row, what) or not median(native, what):
        return None
    return median(row, what) / median(native, what)


def mib_over(row: dict, native: dict, column: str = "peak_total_mib") -> float | None:
    known = row.get(column) is not None and native.get(column) is not None
    return row[column] / max(native[column], 0.1) if known else None  # a tenth of a MiB is the last digit that is kept


def wins(row: dict, native: dict | None) -> list[str]:
    """In what a contender beats native."""
    if native is None or is_ours(row) or row["contender"] == BARE or row["status"] != "measured":
        return []
    found = [what for what in ("forward", "total") if (over_native(row, native, what) or 1.0) < 1.0]
    for what, words in (("peak_forward_mib", "forward memory"), ("peak_total_mib", "memory")):
        if (ratio := mib_over(row, native, what)) is not None and ratio < 1.0:
            found.append(words)
    return found


def in_order(table: Table, native: dict | None) -> Table:
    """Bare GEMMs, ours, then the others from fast to slow, then those that could not."""

    def place(row: dict) -> tuple:
        rank = 3 if row["status"] != "measured" else 0 if row["contender"] == BARE else 1 if is_ours(row) else 2
        time = over_native(row, native, "total") if rank == 2 else 0.0
        return rank, time if time is not None else float("inf")

    return sorted(table, key=place)


def tables_of(rows: list[dict], key: tuple[str, ...] = KEY) -> list[Table]:
    tables: dict[tuple, Table] = {}
    for row in rows:
        tables.setdefault(tuple(row.get(name) or "" for name in key), []).append(row)
    return list(tables.values())


def sweeps_of(tables: list[Table]) -> list[list[Table]]:
    """Tables that differ in what is swept alone, in its order."""
    sweeps: dict[tuple, list[Table]] = {}
    for table in tables:
        row = table[0]
        if sweep := row.get("sweep"):
            key = tuple(row.get(name) or "" for name in KEY if name not in (SWEPT[sweep], "model"))
            sweeps.setdefault(key, []).append(table)

    def value(table: Table) -> float:
        swept = table[0].get(SWEPT[table[0]["sweep"]])
        return swept if isinstance(swept, int | float) else 0  # dtypes stay in their order

    return [sorted(sweep, key=value) for sweep in sweeps.values()]


def shape(row: dict) -> str:
    tokens = f"{row['s']}x{row['t']}" if row.get("s") and row.get("t") else str(row["n"])
    masked = f", {row['masked']:.0%} masked" if row.get("masked") else ""
    capped = f", soft cap {row['softcap']:g}" if row.get("softcap") else ""
    pairs = f", {each} pairs a response" if (each := row.get("pairs_per_response") or 1) > 1 else ""
    return f"{tokens}x{row['d']}x{row['v']}{masked}{capped}{pairs}"


def name_of(row: dict) -> str:
    return f"{row['model']}, {shape(row)}" if row.get("model") else shape(row)


# --- drawing ---


def figure_of(columns: int, heights: list[float], width: float = 9.2) -> tuple[Figure, list[Axes]]:
    """A grid of panels, filled line by line; `heights` in inches, of each line."""
    # hashsalt: names inside the file would be random without it
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rlhf_kernels", "font.size": 10.5})
    plt.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]  # matplotlib brings the first one itself
    figure, axes = plt.subplots(
        len(heights), columns, figsize=(width, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis in axes.flat:
        axis.tick_params(colors=INK, length=0, which="both")
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, list(axes.flat)


def title(axis: Axes, text: str) -> None:
    axis.set_title(text, color=INK, fontsize=10.5, loc="left")


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout(w_pad=3, h_pad=1.5)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def bars(axis: Axes, values: dict[str, float], label: Callable[[float], str], cut_at: float | None = None) -> None:
    """Horizontal bars, the first on top."""
    names = list(values)[::-1]
    limit = min(max(values.values()), cut_at or max(values.values())) or 1.0
    patches = axis.barh(
        names, [min(values[n], limit) for n in names], color=[colour(n) for n in names], height=0.62, clip_on=False
    )  # fmt: skip
    texts = [label(values[n]) + (" →" if values[n] > limit else "") for n in names]
    axis.bar_label(patches, texts, padding=4, color=INK)
    axis.set_xlim(0, 1.3 * limit)
    axis.set_xticks([])


def fast_first(table: Table, column: Callable[[dict], float | None]) -> dict[str, float]:
    """Of who was measured: bare GEMMs and native on top, then the others by what they need."""
    known = {row["contender"]: value for row in measured(table) if (value := column(row)) is not None}
    others = sorted((name for name in known if name not in (BARE, NATIVE)), key=lambda name: known[name])
    return {name: known[name] for name in (BARE, NATIVE, *others) if name in known}


def time_panel(axis: Axes, table: Table, text: str) -> None:
    bare = median(of(table, BARE), "total")
    native = of(table, NATIVE)
    cut_at = CUT * median(native, "total") / bare if native else None
    bars(axis, fast_first(table, lambda row: median(row, "total") / bare), short, cut_at)
    title(axis, text)
    if lacking := [row["contender"] for row in table if row["status"] != "measured"]:
        said = textwrap.fill(f"cannot, or not measured: {', '.join(lacking)}", 34)
        axis.set_xlabel(said, color=INK, fontsize=8.5, loc="left")


def has_times(table: Table) -> bool:
    """A time panel can be drawn: there is a unit, and more than the unit."""
    return of(table, BARE) is not None and len(measured(table)) > 1


def headlines(tables: list[Table]) -> list[Table]:
    """The tables, one a dtype, whose shape the README names; where it was not measured, the first of the same op."""
    able = [t for t in tables if t[0]["op"] == HEADLINE["op"] and not t[0].get("sweep") and has_times(t)]
    exact = [t for t in able if all(t[0][key] == value for key, value in HEADLINE.items())]
    return exact or able[:1]


def draw_headline(tables: list[Table], path: Path) -> bool:
    """Time and memory of forward plus backward at one shape, a line of panels a dtype."""
    if not (found := headlines(tables)):
        return False
    memories = [fast_first(table, lambda row: row.get("peak_total_mib")) for table in found]
    columns = 2 if any(memories) else 1
    figure, axes = figure_of(columns, [0.9 + 0.29 * len(table) for table in found])
    for line, (table, memory) in enumerate(zip(found, memories, strict=True)):
        time_axis, *rest = axes[line * columns : (line + 1) * columns]
        what = f"{table[0]['op']}, {shape(table[0])}, {table[0]['dtype']}"
        time_panel(time_axis, table, f"{what}\ntime, bare GEMMs = 1")
        for axis in rest:
            if not memory:
                axis.set_axis_off()
                continue
            bars(axis, memory, lambda mib: f"{mib:,.0f}")
            title(axis, "peak extra memory, MiB")
    save(figure, path)
    return True


def draw_time(tables: list[Table], path: Path) -> bool:
    """A panel per shape of log-probs: forward plus backward of every contender, in units of the bare GEMMs' time."""
    able = [t for t in tables if t[0]["op"] == HEADLINE["op"] and not t[0].get("masked") and has_times(t)]
    if not able:
        return False
    columns = 2 if len(able) < 5 else 3
    lines = [able[at : at + columns] for at in range(0, len(able), columns)]
    figure, axes = figure_of(columns, [1.0 + 0.24 * max(map(len, line)) for line in lines], width=2.4 + 3.2 * columns)
    for axis in axes[len(able) :]:
        axis.set_visible(False)
    for axis, table in zip(axes, able, strict=False):
        model = table[0].get("model") or table[0]["op"]
        time_panel(axis, table, f"{model}, {table[0]['dtype']}, time\n{shape(table[0])}")
    save(figure, path)
    return True


def draw_memory(sweep: list[Table], path: Path) -> bool:
    """Peak extra memory over the vocabulary, both logarithmic: a line that is flat does not grow with it."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for table in sweep:
        for row in measured(table):
            if row.get("peak_total_mib") is not None:
                # a logarithmic axis has no 0, and under a MiB nobody cares
                lines.setdefault(row["contender"], []).append((row["v"], max(1.0, row["peak_total_mib"])))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    figure, (axis,) = figure_of(1, [3.4], width=7.2)
    for (name, points), marker in zip(lines.items(), "osD^vP*Xph" * len(lines), strict=False):
        axis.loglog(*zip(*points, strict=True), color=colour(name), marker=marker, markersize=5, label=name)
    vocabularies = sorted({v for points in lines.values() for v, _ in points})
    following = [*vocabularies[1:], math.inf]
    crowded = {v for v, after in zip(vocabularies, following, strict=True) if after < 3 * v}  # its label would touch
    axis.set_xticks(vocabularies, ["" if v in crowded else f"{v:,}" for v in vocabularies])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter(lambda mib, _: f"{mib:,.0f}")
    axis.grid(axis="y", color=PALE, linewidth=0.6)
    axis.set_xlabel("vocabulary", color=INK)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK)
    row = sweep[0][0]
    title(axis, f"{row['op']}, {row['n']} tokens, hidden size {row['d']}, {row['dtype']}: peak extra memory, MiB")
    save(figure, path)
    return True


def draw_roofline(tables: list[Table], path: Path) -> bool:
    """How much of the bare GEMMs' rate native, the best peer and eager reach, op by op and shape by shape."""
    able = [table for table in tables if of(table, NATIVE) and "gemm_fraction_total" in of(table, NATIVE)]
    if not able:
        return False
    figure, axes = figure_of(2, [1.3 + 0.36 * len(able)], width=10.5)
    names = [f"{name_of(table[0])}\n{table[0]['op']}, {table[0]['dtype']}" for table in able]
    for axis, what in zip(axes, ("forward", "total"), strict=True):
        kinds: dict[str, list[tuple[float, int]]] = {EAGER: [], "best peer": [], NATIVE: []}
        for at, table in enumerate(able):
            reached = {
                row["contender"]: row[f"gemm_fraction_{what}"]
                for row in measured(table)
                if row.get(f"gemm_fraction_{what}") is not None and (is_peer(row) or row["contender"] == NATIVE)
            }
            peers = [fraction for name, fraction in reached.items() if name not in (NATIVE, EAGER)]
            if peers:
                reached["best peer"] = max(peers)
            for kind, points in kinds.items():
                if kind in reached:
                    points.append((reached[kind], at))
        for (kind, points), marker in zip(kinds.items(), "sDo", strict=True):
            if points:
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, color=colour(kind), marker=marker, s=38, label=kind)
        axis.axvline(1, color=INK, linewidth=1, linestyle="--")
        axis.grid(axis="both", color=PALE, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(0, max(1.08, axis.get_xlim()[1]))
        axis.xaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
        axis.set_ylim(len(able) - 0.5, -0.5)
        axis.set_yticks(range(len(able)), names if axis is axes[0] else [""] * len(able), fontsize=8.5)
        title(axis, f"{what}: of the bare GEMMs' rate")
    handles, labels = axes[1].get_legend_handles_labels()
    axes[1].legend(
        handles[::-1], labels[::-1], loc="upper right", bbox_to_anchor=(1, -0.35 / len(able) - 0.06), ncols=3,
        frameon=False, labelcolor=INK,
    )  # fmt: skip
    save(figure, path)
    return True


def draw_steps(steps: list[dict], path: Path) -> bool:
    """The losses of whole training steps, which lie on top of each other where trainers agree; time and memory. Of the
    first case that measures a part of a step, where there are no whole ones."""
    whole = min(tables_of(steps, ("case",)), key=lambda table: bool(table[0].get("case")), default=[])
    able = measured(whole)
    if not able:
        return False
    figure, (curves, time, memory) = figure_of(3, [0.9 + max(1.8, 0.36 * len(able))], width=10.5)
    for at, step in enumerate(able):  # ever thinner, or the last one would hide the others
        losses = step.get("losses", [])
        width = 1.4 + 1.8 * (len(able) - 1 - at)
        shade, dashes = colour(step["trainer"]), "-" if at == 0 else (0, (3 + at, 2 + at))
        curves.plot(range(1, len(losses) + 1), losses, color=shade, linewidth=width, linestyle=dashes)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(axis="y", color=PALE, linewidth=0.6)
    title(curves, "loss, step by step")
    ours = next((step for step in able if step["trainer"] == "rlhf"), able[0])
    bars(time, {step["trainer"]: median(step, "step") / median(ours, "step") for step in able}, short)
    title(time, f"time of a step, {ours['trainer']} = 1")
    if known := {step["trainer"]: step["peak_extra_mib"] for step in able if step.get("peak_extra_mib") is not None}:
        bars(memory, known, lambda mib: f"{mib:,.0f}")
        title(memory, "peak extra memory, MiB")
    else:
        memory.set_visible(False)
    save(figure, path)
    return True
