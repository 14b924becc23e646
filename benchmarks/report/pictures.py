"""The pictures of docs/performance.md and docs/scaling.md.

They are transparent, in colours that are readable on white and on black. Text stays text, in the reader's sans-serif:
as paths it made files of 290 KB where these have 60. Panels are laid out for DejaVu Sans, which is among the widest, so
that other fonts fit too. The same results give the same bytes.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.measuring import BARE
from benchmarks.report.formatting import short
from benchmarks.report.rows import NATIVE, Table, in_order, measured, median, of, shape

HEADLINE = {"op": "linear_logprobs", "n": 1024, "d": 1024, "v": 151936}  # of the README's picture
CUT = 4.0  # bars longer than so many of native's are cut, or the others could not be told apart
INK, PALE = "#7d8590", "#7d859055"  # readable on white and on black
COLOURS = {  # by the first words of a name: versions of a package are drawn alike
    BARE: "#9aa4b0",
    NATIVE: "#2f81f7",
    "triton": "#3fb950",
    "eager": "#d29922",
    "torch": "#db6d28",
    "TRL": "#a371f7",
    "Liger": "#e667ac",
    "CCE": "#2ba8b4",
}


def colour(name: str) -> str:
    return next((shade for start, shade in COLOURS.items() if name.startswith(start)), INK)


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


def values_of(table: Table, column: Callable[[dict], float | None]) -> dict[str, float]:
    """The contenders measured: bare GEMMs and ours on top, then the others from fast to slow."""
    rows = measured(in_order(table, of(table, NATIVE)))
    return {row["contender"]: value for row in rows if (value := column(row)) is not None}


def time_panel(axis: Axes, table: Table) -> None:
    bare, native = median(of(table, BARE), "total"), of(table, NATIVE)
    cut_at = CUT * median(native, "total") / bare if native else None
    bars(axis, values_of(table, lambda row: median(row, "total") / bare), short, cut_at)
    title(axis, f"{table[0]['op']}, {shape(table[0])}, {table[0]['dtype']}\ntime, {BARE} = 1")
    if lacking := [row["contender"] for row in table if row["status"] != "measured"]:
        text = textwrap.fill(f"cannot, or not measured: {', '.join(lacking)}", 34)
        axis.set_xlabel(text, color=INK, fontsize=8.5, loc="left")


def is_headline(table: Table) -> bool:
    """A table of the README's shape, with a unit and more than the unit."""
    exact = all(table[0].get(key) == value for key, value in HEADLINE.items()) and not table[0].get("sweep")
    return exact and of(table, BARE) is not None and len(measured(table)) > 1


def draw_headline(tables: list[Table], path: Path) -> bool:
    """Time and memory of forward plus backward at one shape, a line of panels a dtype."""
    if not (drawn := [table for table in tables if is_headline(table)]):
        return False
    memories = [values_of(table, lambda row: row.get("peak_total_mib")) for table in drawn]
    columns = 2 if any(memories) else 1
    figure, axes = figure_of(columns, [0.9 + 0.29 * len(table) for table in drawn])
    for line, (table, memory) in enumerate(zip(drawn, memories, strict=True)):
        time_axis, *rest = axes[line * columns : (line + 1) * columns]
        time_panel(time_axis, table)
        for axis in rest:
            if not memory:
                axis.set_axis_off()
                continue
            bars(axis, memory, lambda mib: f"{mib:,.0f}")
            title(axis, "peak extra memory, MiB")
    save(figure, path)
    return True
