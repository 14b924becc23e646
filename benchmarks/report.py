"""`python benchmarks/report.py`: docs/performance.md and docs/images/cpu-*.svg from benchmarks/results/cpu-*.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
# Title, row of the table that it shows, and the contender whose time is 1 (None: the row is in MiB). Only of the whole
# vocabulary: elsewhere (see bf16_vocab in peers.py) bars would compare other things.
PANELS = [
    ("bf16: time, four bare GEMMs = 1", "log-probs bf16 1024x1024x151936, total", "bare GEMMs"),
    ("bf16: peak extra memory, MiB", "peak extra MiB, bfloat16 1024x1024x151936, total", None),
    ("fp32: time, four bare GEMMs = 1", "log-probs fp32 1024x1024x151936, total", "bare GEMMs"),
    ("fp32: peak extra memory, MiB", "peak extra MiB, float32 1024x1024x151936, total", None),
]
INK = "#7d8590"  # readable on white and on black
COLOURS = {"bare GEMMs": "#9aa4b0", "fused": "#2f81f7", "eager": "#d29922", "TRL": "#bc8cff"}


def bars_of(rows: list[dict], what: str, unit: str | None) -> dict[str, float]:
    """Contender -> time in units of `unit`'s, or MiB; empty where `unit` was not measured."""
    of = {row["against"]: row["ratio"] for row in rows if row["what"] == what}
    if unit is None:
        return of
    if unit not in of:
        return {}
    fused = of[unit]
    return {unit: 1.0, "fused": fused} | {name: fused / ratio for name, ratio in of.items() if name != unit}


def draw(rows: list[dict], path: Path) -> None:
    panels = [(title, bars, unit) for title, what, unit in PANELS if len(bars := bars_of(rows, what, unit)) > 1]
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rlhf_kernels", "font.size": 11})
    height = 0.9 + 0.4 * max(len(bars) for _, bars, _ in panels)
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(9.2, height * ((len(panels) + 1) // 2)))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, values, unit) in zip(axes.flat, panels, strict=False):
        names = list(values)[::-1]
        bars = axis.barh(names, [values[n] for n in names], color=[COLOURS[n] for n in names], height=0.62)
        axis.bar_label(bars, [f"{values[n]:.2f}" if unit else f"{values[n]:,.0f}" for n in names], padding=4, color=INK)
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        axis.set_xlim(0, 1.18 * max(values.values()))
        axis.tick_params(colors=INK, length=0)
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.tight_layout(w_pad=3)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def section(results: dict, picture: str) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    lines = [
        f"## {machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']}",
        "",
        f"{versions}. Commit {results['commit']}.",
        "",
        f"![Forward plus backward on this machine](images/{picture})",
        "",
        "| what | against | ratio or MiB | target | error against fp64, nats |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        target = "" if row["target"] is None else f"<= {row['target']}"
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(f"| {row['what']} | {row['against']} | {row['ratio']} | {target} | {error} |")
    return [*lines, ""]


def main() -> None:
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from `benchmarks/results/cpu-*.json`; a file is what "
        "`make bench BENCH_ARGS=--save-results=FILE` wrote on one machine.",
        "",
        "A ratio is the fused op's median time over the other's, both taking turns in one process; below 1 it is "
        "faster. Rows in MiB are peak memory beyond inputs and gradients, each of a process of its own. Where torch "
        "multiplies bf16 many times slower than fp32 (x86 without AVX-512), 16-bit rows that time torch take a 64th of "
        "the vocabulary; the targets beside them were set for the whole, on a CPU with AMX.",
        "",
    ]
    for path in sorted((ROOT / "benchmarks/results").glob("cpu-*.json")):
        results = json.loads(path.read_text())
        draw(results["rows"], ROOT / f"docs/images/{path.stem}.svg")
        lines += section(results, f"{path.stem}.svg")
    (ROOT / "docs/performance.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
