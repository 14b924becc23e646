"""The two pictures of `rlhf frontier`: transparent, in colours that are readable on white and on black."""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import COVERING, rows_of

INK, PALE = "#7d8590", "#7d859055"
LOOKS = {  # colour and marker
    "DPO": ("#2f81f7", "o"), "PPO": ("#3fb950", "s"), "GRPO": ("#e667ac", "D"),
    "rejection sampling + SFT": ("#d29922", "^"), COVERING: ("#56c4d6", "v"),
}  # fmt: skip
BEST_OF_N = "#a371f7"
BY_PAIRS = ("#d29922", "#2f81f7", "#3fb950")  # from the fewest to the most
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "rlhf_trainer", "font.size": 10.5, "figure.dpi": 110,
    "axes.grid": True, "grid.color": PALE, "grid.linewidth": 0.6, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False, "legend.labelcolor": INK, "savefig.transparent": True,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}  # fmt: skip


@matplotlib.rc_context(STYLE)
def draw_frontier(results: dict[str, Any], path: Path) -> None:
    """Reward over KL: what is possible, best of n, and every method's points, with errors over seeds."""
    figure = Figure(figsize=(9.2, 6.0), layout="constrained")
    axis, frontier, best = figure.subplots(), results["frontier"], results["best_of_n"]
    optimum = r"the best possible: $\pi_{ref}\,e^{r/\beta}/Z$"
    axis.plot(*columns(frontier, "kl", "reward"), color=INK, linewidth=2, label=optimum)
    for beta in sorted({point["beta"] for point in results["points"] if "beta" in point}, reverse=True):
        nearest = min(frontier, key=lambda point, beta=beta: abs(math.log(point["beta"] / beta)))
        axis.plot(nearest["kl"], nearest["reward"], "|", color=INK, markersize=14, markeredgewidth=1.6)
        note(axis, rf"$\beta$={beta:.1g}", nearest["kl"], nearest["reward"], INK, (0, 13), "right")
    axis.plot(*columns(best, "kl", "reward"), color=BEST_OF_N, linewidth=1.4, marker=".", label="best of N, exact")
    for point in best[1::2]:
        note(axis, f"{point['n']}", point["kl"], point["reward"], BEST_OF_N, (4, -11))
    for method, look in LOOKS.items():
        draw_method(axis, rows_of(results["points"], method), *look)
    axis.set(xlabel="KL(policy || reference), nats a completion", ylabel="hidden reward, mean")
    axis.legend(loc="lower right")
    save(figure, path)


def draw_method(axis: Axes, rows: list[dict[str, Any]], colour: str, marker: str) -> None:
    if not rows:
        return
    (x, x_error), (y, y_error) = (zip(*(row[key] for row in rows), strict=True) for key in ("kl", "reward"))
    axis.errorbar(
        x, y, xerr=x_error, yerr=y_error, color=colour, marker=marker, markersize=6, linewidth=0.8, linestyle=":",
        elinewidth=1.4, capsize=2.5, label=rows[0]["method"],
    )  # fmt: skip
    for row in rows:
        text = row["strength"].replace("beta ", "").replace(" ", "=")
        note(axis, text, row["kl"][0], row["reward"][0], colour, (5, -12))


@matplotlib.rc_context(STYLE)
def draw_overoptimisation(results: dict[str, Any], path: Path) -> None:
    """Gold and proxy reward over sqrt(KL): a panel for each number of pairs, a line for each seed, the peak of gold."""
    runs = sorted(results["overoptimisation"], key=lambda run: run["pairs"])
    groups = [(pairs, list(group)) for pairs, group in groupby(runs, key=lambda run: run["pairs"])]
    figure = Figure(figsize=(3.3 * len(groups) + 0.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    frontier = [(math.sqrt(p["kl"]), p["reward"] - results["reference"]["reward"]) for p in results["frontier"]]
    for axis, (pairs, group), colour in zip(axes, groups, BY_PAIRS, strict=False):
        axis.plot(*zip(*frontier, strict=True), color=INK, linewidth=1.2, label="the best possible")
        for number, one in enumerate(group):
            x = [math.sqrt(point["kl"]) for point in one["curve"]]
            proxy, gold = columns(one["curve"], "proxy", "gold")
            label = {True: ("proxy", "gold"), False: (None, None)}[number == 0]
            axis.plot(x, proxy, color=colour, linestyle="--", linewidth=1.2, label=label[0])
            axis.plot(x, gold, color=colour, linewidth=2, label=label[1])
            axis.plot(one["peak"]["sqrt_kl"], one["peak"]["gold"], "v", color=colour, markersize=8)
        axis.set(title=f"{pairs:,.0f} pairs", xlabel="sqrt(KL), nats^0.5")
        axis.legend(loc="upper left", fontsize=9)
    axes[0].set_ylabel("reward gained over the reference")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Without a date: the same results give the same bytes."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def columns(points: list[dict[str, Any]], *names: str) -> tuple[list[float], ...]:
    return tuple([point[name] for point in points] for name in names)


def note(axis: Axes, text: str, x: float, y: float, colour: str, offset: tuple[int, int], side: str = "left") -> None:
    axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=colour, fontsize=8.5, ha=side)
