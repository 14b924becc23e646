"""`python -m benchmarks.scaling.growth`: how time and memory grow with N, V, D and masked rows.

Reads benchmarks/results/cpu-*.json, writes the tables of docs/scaling.md between their markers, with those of the cost
model, and docs/images/growth.svg.
`--evidence FILE` first measures what a page and a call cost on this machine into FILE, an evidence-*.json beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, DOC = ROOT / "benchmarks/results", ROOT / "docs/scaling.md"
PICTURE = ROOT / "docs/images/growth.svg"
CONTENDERS = ("native", "eager")
MEASURES = {
    "forward time": "forward_ms",
    "total time": "total_ms",
    "forward memory": "peak_forward_mib",
    "total memory": "peak_total_mib",
}
AXES = {"n": "N", "v": "V", "d": "D"}
MOST_BREAKS, LEAST_TURN = 2, 0.25  # exponents that differ by less are one law, whatever their intervals
LEAST_NOISE = 0.03  # of a logarithm: a lucky fit through few points would claim an interval of nothing
SAID = ("rlhf_kernels", "torch")  # versions that matter here
LEAST_MIB = 1.0  # less is pages and the allocator's own
INK = "#7d8590"  # readable on white and on black
COLOURS = {"native": "#2f81f7", "eager": "#d29922", "bare GEMMs": "#9aa4b0"}
# Student's t, by degrees of freedom 1, 2, ...: two-sided 95% for intervals; 99% for a break, which is sought.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
T99 = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17)


# --- fits ---


class Law(NamedTuple):
    """Exponents, with their 95% intervals, between sizes: first, breaks, last."""

    sizes: tuple[float, ...]
    exponents: tuple[float, ...]
    intervals: tuple[float, ...]

    @property
    def breaks(self) -> tuple[float, ...]:
        return self.sizes[1:-1]

    def __str__(self) -> str:
        parts = [f"{e:.2f} ± {i:.2f}" for e, i in zip(self.exponents, self.intervals, strict=True)]
        until = [f"{part} to {size:,.0f}" for part, size in zip(parts, self.breaks, strict=False)]
        return ", then ".join([*until, parts[-1]])


def t_of(table: Sequence[float], freedom: int) -> float:
    return table[min(freedom, len(table)) - 1] if freedom > 0 else math.inf


class Fit(NamedTuple):
    slopes: np.ndarray
    intervals: np.ndarray
    turns: np.ndarray  # change of slope at each knot
    needed: np.ndarray  # how large it must be to be more than noise
    squares: float


def fit_segments(x: np.ndarray, y: np.ndarray, knots: Sequence[float], noise: float) -> Fit:
    """Continuous and linear between knots, by least squares."""
    columns = np.stack([np.ones_like(x), x - x[0], *(np.maximum(0, x - knot) for knot in knots)], axis=1)
    found = np.linalg.lstsq(columns, y, rcond=None)[0]
    squares, freedom = float(((y - columns @ found) ** 2).sum()), len(x) - columns.shape[1]
    variance = max(squares / freedom if freedom > 0 else 0.0, noise**2)
    covariance = variance * np.linalg.pinv(columns.T @ columns)
    sums = np.tril(np.ones((len(knots) + 1,) * 2))  # a segment's slope is the first and all turns before it
    deviation = np.sqrt(np.diag(sums @ covariance[1:, 1:] @ sums.T))
    needed = t_of(T99, freedom) * np.sqrt(np.diag(covariance)[2:])
    return Fit(np.cumsum(found[1:]), t_of(T95, freedom) * deviation, found[2:], needed, squares)


def fit_law(sizes: Iterable[float], values: Iterable[float], noise: float = LEAST_NOISE) -> Law:
    """values ~ sizes^exponent; where one exponent does not do, with breaks at sizes that were measured."""
    x, y = np.log(np.asarray(list(sizes), float)), np.log(np.asarray(list(values), float))
    if len(x) < 3:
        raise ValueError(f"a law takes at least three sizes, got {len(x)}")
    noise, fit, knots = max(noise, LEAST_NOISE), None, ()
    for count in range(min(MOST_BREAKS, len(x) - 3), -1, -1):  # two breaks may hide each other from a search for one
        tried = [(fit_segments(x, y, some, noise), some) for some in itertools.combinations(x[1:-1], count)]
        fit, knots = min(tried, key=lambda one: one[0].squares)
        if (np.abs(fit.turns) >= np.maximum(fit.needed, LEAST_TURN)).all():
            break
    assert fit is not None
    ends = tuple(float(size) for size in np.exp([x[0], *knots, x[-1]]).round(6))
    return Law(ends, tuple(map(float, fit.slopes)), tuple(map(float, fit.intervals)))


class Line(NamedTuple):
    fixed: float
    slope: float
    fixed_interval: float  # 95%


def fit_line(x: Iterable[float], y: Iterable[float]) -> Line:
    """y = fixed + slope x, least squares of relative errors: noise grows with what is measured."""
    x, y = np.asarray(list(x), float), np.asarray(list(y), float)
    columns = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    found = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
    squares, freedom = float(((columns @ found - 1) ** 2).sum()), len(x) - 2
    variance = max(squares / max(freedom, 1), LEAST_NOISE**2) * np.linalg.pinv(columns.T @ columns)[0, 0]
    return Line(float(found[0]), float(found[1]), t_of(T95, freedom) * math.sqrt(variance))


def local_slopes(sizes: Sequence[float], values: Sequence[float]) -> list[float]:
    return [float(s) for s in np.diff(np.log(values)) / np.diff(np.log(sizes))]


# --- rows ---


def load(pattern: str = "cpu-*.json", folder: Path = RESULTS) -> dict[str, dict]:
    """Name -> results that have swept rows, the newest first."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(pattern))}
    swept = {name: found for name, found in files.items() if any(row.get("sweep") for row in found["rows"])}
    return dict(sorted(swept.items(), key=lambda file: file[1]["measured"], reverse=True))


def value_of(row: dict, column: str) -> float | None:
    """A time is the least of its turns: other load only adds. None where there is nothing to fit."""
    value = row.get(column)
    if isinstance(value, dict):
        return value["min"]
    return value if value is not None and value >= LEAST_MIB else None


class Series(NamedTuple):
    sizes: list[float]
    values: list[float]
    noise: float  # of a value's logarithm


def series(rows: Iterable[dict], op: str, dtype: str, contender: str, sweep: str, column: str) -> Series:
    wanted = (op, dtype, contender, sweep, "measured")
    keys = ("op", "dtype", "contender", "sweep", "status")
    chosen = {row[sweep]: row for row in rows if tuple(row.get(key) for key in keys) == wanted}
    kept = {size: (row, value) for size, row in sorted(chosen.items()) if (value := value_of(row, column)) is not None}
    spreads = [
        math.log(r[column]["median"] / r[column]["min"]) for r, _ in kept.values() if isinstance(r[column], dict)
    ]
    noise = 0.5 * float(np.median(spreads)) if spreads else 0.0  # the least of several turns varies less
    return Series([float(size) for size in kept], [value for _, value in kept.values()], noise)


def swept(rows: Iterable[dict]) -> list[tuple[str, str]]:
    """(op, dtype) that were swept, in their order."""
    return list(dict.fromkeys((row["op"], row["dtype"]) for row in rows if row.get("sweep") in (*AXES, "masked")))


# --- tables ---


def heading(results: dict) -> list[str]:
    device = results["device"]
    said = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in SAID)
    return [
        f"**{device['device']}, {device['threads']} threads, {device['cpu_isa']}.** {said}. "
        f"Commit {results['commit']}, {results['measured']}.",
        "",
    ]


def law_table(results: dict) -> list[str]:
    lines = ["| op | | exponent of | native | eager |", "| --- | --- | --- | --- | --- |"]
    for op, dtype in swept(results["rows"]):
        for what, column in MEASURES.items():
            for sweep, axis in AXES.items():
                cells = []
                for contender in CONTENDERS:
                    got = series(results["rows"], op, dtype, contender, sweep, column)
                    cells.append(str(fit_law(*got)) if len(got.sizes) > 2 else "")
                if any(cells):
                    lines.append(f"| {op} {dtype} | {what} | {axis} | {cells[0]} | {cells[1]} |")
    return lines


def break_table(results: dict) -> list[str]:
    lines = ["| op | contender | | at | exponent before, after | sizes | slopes between neighbours |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for op, dtype in swept(results["rows"]):
        for contender in CONTENDERS:
            for sweep, axis in AXES.items():
                for what, column in MEASURES.items():
                    got = series(results["rows"], op, dtype, contender, sweep, column)
                    law = fit_law(*got) if len(got.sizes) > 2 else None
                    for k, at in enumerate(law.breaks if law else ()):
                        turn = f"{law.exponents[k]:.2f}, {law.exponents[k + 1]:.2f}"
                        slopes = " ".join(f"{s:.2f}" for s in local_slopes(got.sizes, got.values))
                        sizes = " ".join(f"{size:g}" for size in got.sizes)
                        cells = (f"{op} {dtype}", contender, what, f"{axis} = {at:,.0f}", turn, sizes, slopes)
                        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["No law breaks by more than noise."]


def line_table(results: dict) -> list[str]:
    lines = [
        "| op | contender | in | | fixed part, ms | share of the largest |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for op, dtype in swept(results["rows"]):
        for sweep, name in (("masked", "1 - masked"), ("n", "N"), ("d", "D")):
            for contender in CONTENDERS:
                for what in ("forward time", "total time"):
                    sizes, values, _ = series(results["rows"], op, dtype, contender, sweep, MEASURES[what])
                    if len(sizes) < 3:
                        continue
                    line = fit_line([1 - size for size in sizes] if sweep == "masked" else sizes, values)
                    fixed = f"{line.fixed:.1f} ± {line.fixed_interval:.1f}"
                    share = f"{line.fixed / max(values):.0%}"
                    lines.append(f"| {op} {dtype} | {contender} | {name} | {what} | {fixed} | {share} |")
    return lines


def evidence_table(folder: Path = RESULTS) -> list[str]:
    lines: list[str] = []
    for path in sorted(folder.glob("evidence-*.json")):
        found = json.loads(path.read_text())
        lines += [
            f"**{found['device']['device']}, {found['device']['cpu_isa']}**, one thread, {found['measured']}.",
            "",
        ]
        lines += ["| | |", "| --- | ---: |"]
        lines += [f"| {what} | {value:,} |" for what, value in found["machine"].items()]
        lines += ["", "| one call, fp32 | pages: logits | head | page faults | ms in the program | ms in the system |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
        for row in found["calls"]:
            shape = f"{row['contender']}, {row['what']}, {row['n']} x {row['d']} x {row['v']}"
            pages = f"{row['logit_pages']:,} | {row['weight_pages']:,} | {row['faults']:,}"
            lines.append(f"| {shape} | {pages} | {row['program_ms']} | {row['system_ms']} |")
        lines.append("")
    return lines or ["Not measured yet: `python -m benchmarks.scaling.growth --evidence FILE`.", ""]


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """`text` with new lines between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin} and {end} must each be there once")
    body = "\n".join([begin, "", *lines]).rstrip() + "\n\n"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body + end, text, flags=re.DOTALL)


def blocks(files: dict[str, dict]) -> dict[str, list[str]]:
    """Marker -> lines."""
    parts: dict[str, list[str]] = {"laws": [], "breaks": [], "fixed": []}
    for results in files.values():
        for name, table in (("laws", law_table), ("breaks", break_table), ("fixed", line_table)):
            parts[name] += [*heading(results), *table(results), ""]
    missing = ["No file of results has swept rows yet: `make bench` writes them."]
    picture = [
        f"![Time against N and V, memory against V, time against the masked fraction](images/{PICTURE.name})",
        "",
        "*Fused (native), eager torch and the bare GEMMs. Ringed: sizes where a law breaks.*",
    ]
    found = {name: lines or missing for name, lines in parts.items()}
    return found | {"picture": picture if files else missing, "evidence": evidence_table()}


def written(text: str, files: dict[str, dict]) -> str:
    """docs/scaling.md as the results say it."""
    from benchmarks.scaling.cost_tables import blocks as cost_blocks

    for name, lines in (blocks(files) | cost_blocks(files)).items():
        text = replaced(text, name, lines)
    return text


# --- picture ---


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    op, dtype = swept(results["rows"])[0]
    panels = [
        ("forward + backward, ms", "n", "total_ms"),
        ("forward + backward, ms", "v", "total_ms"),
        ("peak extra memory, MiB", "v", "peak_total_mib"),
        ("forward + backward, ms", "masked", "total_ms"),
    ]
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rlhf_kernels", "font.size": 10})
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.0))
    for axis, (title, sweep, column) in zip(axes.flat, panels, strict=True):
        for contender, colour in COLOURS.items():
            got = series(results["rows"], op, dtype, contender, sweep, column)
            if len(got.sizes) < 2:
                continue
            (line,) = axis.plot(got.sizes, got.values, "o-", color=colour, markersize=3.5, linewidth=1.4)
            line.set_label(contender)
            if sweep != "masked" and contender != "bare GEMMs" and len(got.sizes) > 2:
                at = [(s, v) for s, v in zip(got.sizes, got.values, strict=True) if s in fit_law(*got).breaks]
                axis.plot(*zip(*at, strict=True), "o", mfc="none", color=colour, markersize=9) if at else None
        if sweep == "masked":
            axis.set_ylim(bottom=0)
        else:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.set_title(title, color=INK, fontsize=10, loc="left")
        axis.set_xlabel("masked fraction" if sweep == "masked" else AXES[sweep], color=INK)
        axis.tick_params(colors=INK, which="both")
        axis.grid(color=INK, alpha=0.2, linewidth=0.5)
        for spine in axis.spines.values():
            spine.set_color(INK)
    axes.flat[0].legend(frameon=False, labelcolor=INK)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def write() -> None:
    files = load()
    DOC.write_text(written(DOC.read_text(), files))
    if files:
        draw(next(iter(files.values())), PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evidence", metavar="FILE", type=Path, help="measure this machine's pages, memory and calls")
    if path := parser.parse_args().evidence:
        from benchmarks.scaling.evidence import measure_evidence

        measure_evidence(path)
    write()


if __name__ == "__main__":
    main()
