"""The two pictures of `rlhf frontier`: transparent, in colours that are readable on white and on black."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import COVERING, mean_and_error, strengths_of

INK, PALE = "#7d8590", "#7d859055"
COLOURS = {
    "DPO": "#2f81f7", "PPO": "#3fb950", "GRPO": "#e667ac", "rejection sampling + SFT": "#d29922", COVERING: "#56c4d6",
}  # fmt: skip
MARKERS = {"DPO": "o", "PPO": "s", "GRPO": "D", "rejection sampling + SFT": "^", COVERING: "v"}
BEST_OF_N = "#a371f7"
BY_PAIRS = ("#d29922", "#2f81f7", "#3fb950")  # from the fewest to the most
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "rlhf_trainer", "font.size": 10.5}


@matplotlib.rc_context(STYLE)
def draw_frontier(results: dict[str, Any], path: Path) -> None:
    """Reward over KL: what is possible, best of n, and every method's points, with errors over seeds."""
    figure, (axis,) = figure_of(1, (9.2, 6.0))
    frontier, best = results["frontier"], results["best_of_n"]
    optimum = r"the best possible: $\pi_{ref}\,e^{r/\beta}/Z$"
    axis.plot(*columns(frontier, "kl", "reward"), color=INK, linewidth=2, label=optimum)
    for point in near(frontier, strengths_of(results["points"], "beta")):
        axis.plot(point["kl"], point["reward"], "|", color=INK, markersize=14, markeredgewidth=1.6)
        note(axis, rf"$\beta$={point['beta']:.1g}", point, INK, (0, 13), "right")
    axis.plot(*columns(best, "kl", "reward"), color=BEST_OF_N, linewidth=1.4, marker=".", label="best of N, exact")
    for point in best[1::2]:
        note(axis, f"{point['n']}", point, BEST_OF_N, (4, -11), "left")
    for name, colour in COLOURS.items():
        points = [point for point in results["points"] if point["method"] == name]
        if points:
            draw_method(axis, points, name, colour)
    axis.set(xlabel="KL(policy || reference), nats a completion", ylabel="hidden reward, mean")
    axis.legend(loc="lower right", frameon=False, labelcolor=INK)
    figure.savefig(path, transparent=True, metadata=metadata(path))


def draw_method(axis: Axes, points: list[dict[str, Any]], name: str, colour: str) -> None:
    knob = "beta" if "beta" in points[0] else "N"
    means = []
    for strength in strengths_of(points, knob):
        here = [point for point in points if point[knob] == strength]
        (kl, kl_error), (reward, reward_error) = (mean_and_error([p[key] for p in here]) for key in ("kl", "reward"))
        means.append({"strength": strength, "kl": kl, "reward": reward, "kl_error": kl_error, "error": reward_error})
    x, y = columns(means, "kl", "reward")
    x_error, y_error = columns(means, "kl_error", "error")
    axis.errorbar(
        x, y, xerr=x_error, yerr=y_error, color=colour, marker=MARKERS[name], markersize=6, linewidth=0.8,
        linestyle=":", elinewidth=1.4, capsize=2.5, label=name,
    )  # fmt: skip
    for point in means:
        text = f"{point['strength']:g}" if knob == "beta" else f"N={point['strength']:g}"
        note(axis, text, point, colour, (5, -12), "left")


@matplotlib.rc_context(STYLE)
def draw_overoptimisation(results: dict[str, Any], path: Path) -> None:
    """Gold and proxy reward over sqrt(KL): a panel for each number of pairs, a line for each seed, the peak of gold."""
    runs = sorted(results["overoptimisation"], key=lambda run: run["pairs"])
    groups = [(pairs, list(group)) for pairs, group in groupby(runs, key=lambda run: run["pairs"])]
    figure, axes = figure_of(len(groups), (3.3 * len(groups) + 0.8, 4.2))
    frontier = [(math.sqrt(p["kl"]), p["reward"] - results["reference"]["reward"]) for p in results["frontier"]]
    for axis, (pairs, group), colour in zip(axes, groups, BY_PAIRS, strict=False):
        axis.plot(*zip(*frontier, strict=True), color=INK, linewidth=1.2, label="the best possible")
        for number, one in enumerate(group):
            x = [math.sqrt(point["kl"]) for point in one["curve"]]
            proxy, gold = columns(one["curve"], "proxy", "gold")
            label = {True: ("proxy", "gold"), False: (None, None)}[number == 0]
            axis.plot(x, proxy, color=colour, linestyle="--", linewidth=1.2, label=label[0])
            axis.plot(x, gold, color=colour, linewidth=2, label=label[1])
            peak = one["peak"]
            axis.plot(peak["sqrt_kl"], peak["gold"], "v", color=colour, markersize=8)
        axis.set_title(f"{pairs:,.0f} pairs", color=INK, fontsize=10.5, loc="left")
        axis.set_xlabel("sqrt(KL), nats^0.5", color=INK)
        axis.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=9)
    axes[0].set_ylabel("reward gained over the reference")
    figure.savefig(path, transparent=True, metadata=metadata(path))


def figure_of(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False).flat)
    for axis in axes:
        axis.tick_params(colors=INK, length=0)
        axis.spines[:].set_visible(False)
        axis.grid(color=PALE, linewidth=0.6)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def metadata(path: Path) -> dict[str, None]:
    """Saves without a date: the same results give the same bytes."""
    return {"Date": None} if path.suffix == ".svg" else {}


def columns(points: list[dict[str, Any]], *names: str) -> tuple[list[float], ...]:
    return tuple([point[name] for point in points] for name in names)


def near(frontier: list[dict[str, float]], betas: list[float]) -> list[dict[str, float]]:
    """The points of the frontier whose beta is closest to these."""
    return [min(frontier, key=lambda point: abs(math.log(point["beta"] / beta))) | {"beta": beta} for beta in betas]


def note(axis: Axes, text: str, point: dict[str, Any], colour: str, offset: tuple[int, int], side: str) -> None:
    axis.annotate(
        text, (point["kl"], point["reward"]), xytext=offset, textcoords="offset points", color=colour, fontsize=8.5,
        ha=side,
    )  # fmt: skip
