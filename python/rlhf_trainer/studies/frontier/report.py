"""The expectations of `rlhf frontier`, and whether they held: every statement is computed from the points."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ...evaluation.report import filled

NEAR = 0.9  # share of the gain over the reference that is possible at the same KL
ROUNDING = 1e-6  # error of sums over leaves and of bisection

COVERING = "DPO, half from PPO"  # DPO on pairs of completions of which half are from PPO

Results = dict[str, Any]
Point = dict[str, Any]


def report_of(results: Results) -> tuple[list[Point], str]:
    """The expectations, each with whether it held and the numbers that say so; and all of it as text."""
    points, runs = results["points"], results["overoptimisation"]
    methods, pairs = list(dict.fromkeys(point["method"] for point in points)), sorted({run["pairs"] for run in runs})
    expectations = [
        none_above(points), *(grows(points, method) for method in methods),
        *(is_near(points, method) for method in methods if method in ("PPO", "DPO")), covers(points),
        *(is_below(points, method) for method in methods if method.startswith("rejection")),
        within_bound(results["best_of_n"]), proxy_rises(runs), *(falls(runs, count) for count in pairs),
        *(peaks_later(runs, fewer, more) for fewer, more in itertools.pairwise(pairs)),
    ]  # fmt: skip
    rows = [row for method in methods for row in rows_of(points, method)]
    template = Path(__file__).with_name("report.txt.jinja")
    return expectations, filled(template, **results | {"expectations": expectations, "rows": rows})


# --- the expectations


def stated(expected: str, holds: bool, result: str) -> Point:
    return {"expected": expected, "holds": bool(holds), "found": result}


def none_above(points: Sequence[Point]) -> Point:
    nearest = max(points, key=lambda point: point["reward"] - point["best_reward"])
    over = nearest["reward"] - nearest["best_reward"]
    name = f"{nearest['method']}, {strength_of(nearest)}, seed {nearest['seed']}"
    result = f"of {len(points)} models the one nearest to it is {-over:.4f} below ({name})"
    return stated("no method is above the optimum", over <= ROUNDING, result)


def grows(points: Sequence[Point], method: str) -> Point:
    """Reward and KL grow with the strength; a step down counts where it is more than twice its error."""
    rows = rows_of(points, method)
    wrong = []
    for weak, strong in itertools.pairwise(rows):
        for key in ("reward", "kl"):
            (before, error), (after, error_after) = weak[key], strong[key]
            if after - before < -2 * math.hypot(error, error_after):
                to = strong["strength"].split()[1]
                wrong.append(f"{key} {before:.2f} to {after:.2f} from {weak['strength']} to {to}")
    way = "beta falls" if rows[0]["strength"].startswith("beta") else "N grows"
    return stated(f"{method}: reward and KL grow as {way}", not wrong, "; ".join(wrong) or "at every step")


def is_near(points: Sequence[Point], method: str) -> Point:
    rows = rows_of(points, method)
    holds = all(row["share"][0] + 2 * row["share"][1] >= NEAR for row in rows)
    return stated(f"{method} is near the frontier (at least {NEAR:.0%} of the gain)", holds, shares(rows))


def covers(points: Sequence[Point]) -> Point:
    """DPO does better where its pairs hold completions of the best policy: that these lacked is why it fell short."""
    better, plain = rows_of(points, COVERING), {row["strength"]: row["share"] for row in rows_of(points, "DPO")}
    gains = [difference_of(plain[row["strength"]], row["share"]) for row in better]
    return stated(f"{COVERING} comes nearer than DPO", all(gain > 2 * error for gain, error in gains), shares(better))


def is_below(points: Sequence[Point], method: str) -> Point:
    """Below by more than twice the error at every N."""
    rows = rows_of(points, method)
    holds = all(row["share"][0] + 2 * row["share"][1] < 1 for row in rows)
    return stated(f"{method} is below the frontier", holds, shares(rows))


def shares(rows: Sequence[Point]) -> str:
    return ", ".join("{:.0%}+-{:.0%} at {}".format(*row["share"], row["strength"]) for row in rows)


def within_bound(best: Sequence[Point]) -> Point:
    excess = max(point["kl"] - point["kl_bound"] for point in best)
    result = "at N {n} {kl:.4f} of {kl_bound:.4f} nats".format(**best[-1])
    return stated("best of N has a KL of at most log N - (N-1)/N", excess <= ROUNDING, result)


def proxy_rises(runs: Sequence[Point]) -> Point:
    steps = [b["proxy"] - a["proxy"] for run in runs for a, b in itertools.pairwise(run["curve"])]
    return stated("proxy reward keeps rising", min(steps) >= -ROUNDING, f"smallest step {min(steps):+.1e}")


def falls(runs: Sequence[Point], pairs: float) -> Point:
    here = [run["peak"] for run in runs if run["pairs"] == pairs]
    fall, error = mean_and_error([peak["gold"] - peak["gold_at_end"] for peak in here])
    place, top = (mean_and_error([peak[key] for peak in here]) for key in ("sqrt_kl", "gold"))
    inside = sum(peak["inside"] for peak in here)
    result = (
        "peak at sqrt(KL) {:.2f}+-{:.2f} with {:+.2f}+-{:.2f}, then falls by ".format(*place, *top)
        + f"{fall:.2f}+-{error:.2f}; a peak inside the curve in {inside} of {len(here)}"
    )
    return stated(f"{pairs:,.0f} pairs: gold peaks and falls", fall > 2 * error and inside > 0, result)


def peaks_later(runs: Sequence[Point], fewer: float, more: float) -> Point:
    a, b = (
        mean_and_error([run["peak"]["sqrt_kl"] for run in runs if run["pairs"] == pairs]) for pairs in (fewer, more)
    )
    later, error = difference_of(a, b)
    result = f"sqrt(KL) {a[0]:.2f} and {b[0]:.2f}, a difference of {later:+.2f}+-{error:.2f}"
    return stated(f"gold peaks later with {more:,.0f} pairs than with {fewer:,.0f}", later > 2 * error, result)


# --- numbers


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is 0 for a single value."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def difference_of(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """b - a of two (mean, error), with its error."""
    return b[0] - a[0], math.hypot(a[1], b[1])


def strength_of(point: Point) -> str:
    return f"N {point['N']:g}" if "N" in point else f"beta {point['beta']:g}"


def rows_of(points: Iterable[Point], method: str) -> list[Point]:
    """For each strength of a method, from weak to strong (beta falls, N grows), the (mean, error) of all numbers."""
    keys = ("reward", "kl", "best_reward", "share", "train_seconds", "train_cpu_seconds")
    by_strength: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.get("N") or -point["beta"]):
        if point["method"] == method:
            by_strength.setdefault(strength_of(point), []).append(point)
    return [
        {"method": method, "strength": strength} | {key: mean_and_error([point[key] for point in here]) for key in keys}
        for strength, here in by_strength.items()
    ]
