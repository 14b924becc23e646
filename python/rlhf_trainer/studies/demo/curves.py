"""The demo's picture: the curves of metrics.jsonl, and the hidden rewards of what each model writes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#7f7f7f"
GREEN = "#4d9221"


def draw_curves(metrics_file: Path, hidden_rewards: dict[str, list[int]], path: Path) -> None:
    """Four panels: loss, implicit rewards, accuracy over steps; the distribution of the hidden reward."""
    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
    loss, rewards, accuracy, hidden = figure.subplots(2, 2).flat
    figure.suptitle("DPO on preferences from a hidden reward (the annotator errs: no model can agree with every label)")

    _lines(loss, records, {"loss": (BLUE, "training batches")}, dotted=True)
    _lines(loss, records, {"eval/loss": (ORANGE, "held-out pairs")})
    loss.axhline(math.log(2), color=GREY, linestyle=":", linewidth=1)
    loss.annotate("log 2: no preference", (1, math.log(2)), xycoords=("axes fraction", "data"), color=GREY,
                  ha="right", va="bottom", fontsize=9)  # fmt: skip
    loss.set(title="Loss (nats)", xlabel="step")

    _lines(rewards, records, {"eval/rewards/chosen": (BLUE, "chosen"), "eval/rewards/rejected": (ORANGE, "rejected")})
    rewards.axhline(0, color=GREY, linestyle=":", linewidth=1)
    rewards.set(title=r"Implicit reward of held-out reviews, $\beta\,\log(\pi/\pi_{ref})$", xlabel="step")

    _lines(accuracy, records, {"rewards/accuracies": (BLUE, "training batches")}, dotted=True)
    _lines(accuracy, records, {"eval/rewards/accuracies": (ORANGE, "held-out pairs")})
    accuracy.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    accuracy.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), color=GREY, ha="right", va="bottom",
                      fontsize=9)  # fmt: skip
    accuracy.set(title="Pairs whose chosen review has the larger implicit reward", xlabel="step", ylim=(0.4, 1))

    _histogram(hidden, hidden_rewards)
    for axes in (loss, rewards, accuracy, hidden):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _lines(axes: Axes, records: list[dict], series: dict[str, tuple[str, str]], dotted: bool = False) -> None:
    for key, (color, label) in series.items():
        points = [(r["step"], r[key]) for r in records if key in r]
        if "accuracies" in key:  # until the first update has shown, every margin is a tie: 0 there would only mislead
            points = [(step, value) for step, value in points if step > 1]
        style = {"alpha": 0.45, "linewidth": 1.2} if dotted else {"linewidth": 2, "marker": "o", "markersize": 4}
        axes.plot(*zip(*points, strict=True), color=color, label=label, **style)


def _histogram(axes: Axes, hidden_rewards: dict[str, list[int]]) -> None:
    width = 0.8 / len(hidden_rewards)
    for k, ((name, rewards), color) in enumerate(zip(hidden_rewards.items(), (ORANGE, GREEN, BLUE), strict=False)):
        counts, mean = Counter(rewards), sum(rewards) / len(rewards)
        values = sorted(counts)
        left = [value + (k - (len(hidden_rewards) - 1) / 2) * width for value in values]
        axes.bar(left, [counts[v] / len(rewards) for v in values], width=width, color=color,
                 label=f"{name}, mean {mean:+.2f}")  # fmt: skip
    axes.set(title="Hidden reward of sampled reviews, held-out prompts", xlabel="reward", ylabel="share of reviews")
