"""`python benchmarks/report.py`: docs/performance.md and docs/images/cpu.svg from benchmarks/results/cpu.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
TOTAL = "log-probs bf16 1024x1024x151936, total"
MEMORY = "peak extra MiB, bfloat16 1024x1024x151936, total"
INK = "#7d8590"  # readable on white and on black
COLOURS = {"bare GEMMs": "#9aa4b0", "fused": "#2f81f7", "eager": "#d29922", "TRL": "#bc8cff"}


def ratios(rows: list[dict], what: str) -> dict[str, float]:
    return {row["against"]: row["ratio"] for row in rows if row["what"] == what}


def draw(rows: list[dict], path: Path) -> None:
    to, mib = ratios(rows, TOTAL), ratios(rows, MEMORY)
    fused = to["bare GEMMs"]
    times = {"bare GEMMs": 1.0, "fused": fused} | {name: fused / to[name] for name in ("eager", "TRL") if name in to}
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rlhf_kernels", "font.size": 11})
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.5))
    panels = [
        (times, "time, four bare GEMMs = 1", "{:.2f}"),
        ({"fused": mib["fused"], "eager": mib["eager"]}, "peak extra memory, MiB", "{:,.0f}"),
    ]
    for axis, (values, title, label) in zip(axes, panels, strict=True):
        names = list(values)[::-1]
        bars = axis.barh(names, [values[n] for n in names], color=[COLOURS[n] for n in names], height=0.62)
        axis.bar_label(bars, [label.format(values[n]) for n in names], padding=4, color=INK)
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        axis.set_xlim(0, 1.18 * max(values.values()))
        axis.tick_params(colors=INK, length=0)
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.tight_layout(w_pad=3)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def table(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from `benchmarks/results/cpu.json`, which "
        "`make bench BENCH_ARGS=--save-results=benchmarks/results/cpu.json` wrote.",
        f"Machine: {machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']}. {versions}. "
        f"Commit {results['commit']}.",
        "",
        "A ratio is the fused op's median time over the other's, both taking turns in one process; below 1 it is "
        "faster. Rows in MiB are peak memory beyond inputs and gradients, each of a process of its own.",
        "",
        "| what | against | ratio or MiB | target | error against fp64, nats |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        target = "" if row["target"] is None else f"<= {row['target']}"
        cells = [
            row["what"],
            row["against"],
            str(row["ratio"]),
            target,
            f"{row['error']:.1e}" if "error" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    draw(results["rows"], ROOT / "docs/images/cpu.svg")
    (ROOT / "docs/performance.md").write_text(table(results))


if __name__ == "__main__":
    main()
