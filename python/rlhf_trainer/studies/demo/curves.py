"""The demo's picture: the curves of metrics.jsonl, and the hidden rewards of what each model writes."""

import json
import math
from pathlib import Path
from statistics import fmean

import matplotlib
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
    levels = (loss, math.log(2), "log 2: no preference"), (rewards, 0, None), (accuracy, 0.5, "chance")
    for axes, level, label in levels:
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1, label=label)
    loss.set(title="Loss (nats)", xlabel="step")
    rewards.set(title="Implicit reward of held-out reviews, beta log(pi / pi_ref)", xlabel="step")
    accuracy.set(title="Pairs whose chosen review has the larger implicit reward", xlabel="step", ylim=(0.4, 1))
    values = [value for of_model in hidden_rewards.values() for value in of_model]
    hidden.hist(
        hidden_rewards.values(), [value - 0.5 for value in range(min(values), max(values) + 2)], density=True,
        rwidth=0.8, color=[ORANGE, GREEN, BLUE],
        label=[f"{name}, mean {fmean(of_model):+.2f}" for name, of_model in hidden_rewards.items()],
    )  # fmt: skip
    hidden.set(title="Hidden reward of sampled reviews, held-out prompts", xlabel="reward", ylabel="share of reviews")
    for axes in panels:
        axes.legend()
    figure.savefig(path)
