"""The demo's picture: the curves of metrics.jsonl, and the hidden rewards of what each model writes."""

import json
import math
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2166ac", "#d6604d", "#4d9221", "#7f7f7f"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 110}
TRAINING, HELD_OUT = "training batches", "held-out pairs"


@matplotlib.rc_context(STYLE)
def draw_curves(metrics_file: Path, hidden_rewards: dict[str, list[int]], path: Path) -> None:
    """Four panels: loss, implicit rewards, accuracy over steps; the distribution of the hidden reward."""
    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    loss, rewards, accuracy, hidden = panels = figure.subplots(2, 2).flat[:]
    figure.suptitle("DPO on preferences from a hidden reward (the annotator errs: no model can agree with every label)")
    for axes, key, color, label in (
        (loss, "loss", BLUE, TRAINING), (loss, "eval/loss", ORANGE, HELD_OUT),
        (rewards, "eval/rewards/chosen", BLUE, "chosen"), (rewards, "eval/rewards/rejected", ORANGE, "rejected"),
        (accuracy, "rewards/accuracies", BLUE, TRAINING), (accuracy, "eval/rewards/accuracies", ORANGE, HELD_OUT),
    ):  # fmt: skip
        # Until the first update has shown, every margin is a tie: an accuracy of 0 there would only mislead.
        first = 2 if axes is accuracy else 0
        points = [(r["step"], r[key]) for r in records if key in r and r["step"] >= first]
        held_out = key.startswith("eval/")
        style = {"linewidth": 2, "marker": "o", "markersize": 4} if held_out else {"linewidth": 1.2, "alpha": 0.45}
        axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
    _level(loss, math.log(2), "log 2: no preference")
    _level(rewards, 0)
    _level(accuracy, 0.5, "chance")
    loss.set(title="Loss (nats)", xlabel="step")
    rewards.set(title=r"Implicit reward of held-out reviews, $\beta\,\log(\pi/\pi_{ref})$", xlabel="step")
    accuracy.set(title="Pairs whose chosen review has the larger implicit reward", xlabel="step", ylim=(0.4, 1))
    _histogram(hidden, hidden_rewards)
    for axes in panels:
        axes.legend()
    figure.savefig(path)


def _level(axes: Axes, y: float, text: str = "") -> None:
    axes.axhline(y, color=GREY, linestyle=":", linewidth=1)
    at = ("axes fraction", "data")
    axes.annotate(text, (1, y), xycoords=at, color=GREY, ha="right", va="bottom", fontsize=9)


def _histogram(axes: Axes, hidden_rewards: dict[str, list[int]]) -> None:
    width = 0.8 / len(hidden_rewards)
    for k, ((name, rewards), color) in enumerate(zip(hidden_rewards.items(), (ORANGE, GREEN, BLUE), strict=False)):
        counts, mean = Counter(rewards), sum(rewards) / len(rewards)
        values = sorted(counts)
        left = [value + (k - (len(hidden_rewards) - 1) / 2) * width for value in values]
        shares = [counts[value] / len(rewards) for value in values]
        axes.bar(left, shares, width=width, color=color, label=f"{name}, mean {mean:+.2f}")
    axes.set(title="Hidden reward of sampled reviews, held-out prompts", xlabel="reward", ylabel="share of reviews")
