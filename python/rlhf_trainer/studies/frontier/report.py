"""The expectations of `rlhf frontier`, and whether they held: every statement is computed from the points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

NEAR = 0.9  # share of the gain over the reference that is possible at the same KL
ROUNDING = 1e-6  # error of sums over leaves and of bisection

COVERING = "DPO, half from PPO"  # DPO on pairs of completions of which half are from PPO

Results = dict[str, Any]
Point = dict[str, Any]


def report_of(results: Results) -> tuple[list[Point], str]:
    """The expectations, each with whether it held and the numbers that say so; and all of it as text."""
    points, runs = results["points"], results["overoptimisation"]
    expectations = [
        none_above(points), *(grows(points, method) for method in methods_of(points)),
        *(is_near(points, method) for method in methods_of(points) if method in ("PPO", "DPO")),
        covers(points), *(is_below(points, method) for method in methods_of(points) if method.startswith("rejection")),
        within_bound(results["best_of_n"]), proxy_rises(runs), *(falls(runs, pairs) for pairs in pairs_of(runs)),
        *(peaks_later(runs, a, b) for a, b in itertools.pairwise(pairs_of(runs))),
    ]  # fmt: skip
    lines = [head_of(results), "", *tables(results), "", "Expected, and what came:"]
    for one in expectations:
        lines.append(f"  {'holds ' if one['holds'] else 'FAILED'}  {one['expected']}: {one['found']}")
    return expectations, "\n".join(lines)


# --- the expectations


def stated(expected: str, holds: bool, result: str) -> Point:
    return {"expected": expected, "holds": bool(holds), "found": result}


def none_above(points: Sequence[Point]) -> Point:
    nearest = max(points, key=lambda point: point["reward"] - point["best_reward"])
    over = nearest["reward"] - nearest["best_reward"]
    return stated(
        "no method is above the optimum", over <= ROUNDING,
        f"of {len(points)} models the one nearest to it is {-over:.4f} below ({name_of(nearest)})",
    )  # fmt: skip


def grows(points: Sequence[Point], method: str) -> Point:
    """Reward and KL grow with the strength; a step down counts where it is more than twice its error."""
    knob, rows = rows_of(points, method)
    wrong = []
    for weak, strong in itertools.pairwise(rows):
        for key in ("reward", "kl"):
            (before, error), (after, error_after) = weak[key], strong[key]
            if after - before < -2 * math.hypot(error, error_after):
                wrong.append(f"{key} {before:.2f} to {after:.2f} from {knob} {weak[knob]:g} to {strong[knob]:g}")
    way = "beta falls" if knob == "beta" else "N grows"
    return stated(f"{method}: reward and KL grow as {way}", not wrong, "; ".join(wrong) or "at every step")


def is_near(points: Sequence[Point], method: str) -> Point:
    knob, rows = rows_of(points, method)
    holds = all(row["share"][0] + 2 * row["share"][1] >= NEAR for row in rows)
    return stated(f"{method} is near the frontier (at least {NEAR:.0%} of the gain)", holds, shares(rows, knob))


def covers(points: Sequence[Point]) -> Point:
    """DPO does better where its pairs hold completions of the best policy: that these lacked is why it fell short."""
    knob, better = rows_of(points, COVERING)
    plain = {row[knob]: row["share"] for row in rows_of(points, "DPO")[1]}
    gains = [
        (row["share"][0] - plain[row[knob]][0], math.hypot(row["share"][1], plain[row[knob]][1])) for row in better
    ]
    holds = all(gain > 2 * error for gain, error in gains)
    return stated(f"{COVERING} comes nearer than DPO", holds, shares(better, knob))


def is_below(points: Sequence[Point], method: str) -> Point:
    """Below by more than twice the error at every N, and with less of the gain than PPO and DPO on average."""
    knob, rows = rows_of(points, method)
    holds = all(row["share"][0] + 2 * row["share"][1] < 1 for row in rows)
    return stated(f"{method} is below the frontier", holds, shares(rows, knob))


def shares(rows: Sequence[Point], knob: str) -> str:
    return ", ".join(f"{row['share'][0]:.0%}+-{row['share'][1]:.0%} at {knob} {row[knob]:g}" for row in rows)


def within_bound(best: Sequence[Point]) -> Point:
    excess = max(point["kl"] - point["kl_bound"] for point in best)
    last = best[-1]
    result = f"at N {last['n']} {last['kl']:.4f} of {last['kl_bound']:.4f} nats"
    return stated("best of N has a KL of at most log N - (N-1)/N", excess <= ROUNDING, result)


def proxy_rises(runs: Sequence[Point]) -> Point:
    steps = [b["proxy"] - a["proxy"] for run in runs for a, b in itertools.pairwise(run["curve"])]
    return stated("proxy reward keeps rising", min(steps) >= -ROUNDING, f"smallest step {min(steps):+.1e}")


def falls(runs: Sequence[Point], pairs: float) -> Point:
    here = [run["peak"] for run in runs if run["pairs"] == pairs]
    fall, error = mean_and_error([peak["gold"] - peak["gold_at_end"] for peak in here])
    (place, place_error), (top, top_error) = (mean_and_error([p[key] for p in here]) for key in ("sqrt_kl", "gold"))
    return stated(
        f"{pairs:,.0f} pairs: gold peaks and falls", fall > 2 * error and any(peak["inside"] for peak in here),
        f"peak at sqrt(KL) {place:.2f}+-{place_error:.2f} with {top:+.2f}+-{top_error:.2f}, then falls by "
        f"{fall:.2f}+-{error:.2f}; a peak inside the curve in {sum(p['inside'] for p in here)} of {len(here)}",
    )  # fmt: skip


def peaks_later(runs: Sequence[Point], fewer: float, more: float) -> Point:
    (a, a_error), (b, b_error) = (
        mean_and_error([run["peak"]["sqrt_kl"] for run in runs if run["pairs"] == pairs]) for pairs in (fewer, more)
    )
    error = math.hypot(a_error, b_error)
    result = f"sqrt(KL) {a:.2f} and {b:.2f}, a difference of {b - a:+.2f}+-{error:.2f}"
    return stated(f"gold peaks later with {more:,.0f} pairs than with {fewer:,.0f}", b - a > 2 * error, result)


# --- numbers


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is 0 for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def methods_of(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point["method"] for point in points))


def pairs_of(runs: Iterable[Point]) -> list[float]:
    return sorted({run["pairs"] for run in runs})


def strengths_of(points: Iterable[Point], knob: str) -> list[float]:
    """The strengths, from weak to strong: beta falls, N grows."""
    return sorted({point[knob] for point in points if knob in point}, reverse=knob == "beta")


def rows_of(points: Sequence[Point], method: str) -> tuple[str, list[Point]]:
    """The option that sets a method's strength ("beta" or "N"), and for each of its values, from weak to strong, the
    (mean, error) of all numbers."""
    own = [point for point in points if point["method"] == method]
    knob = "beta" if "beta" in own[0] else "N"
    rows = []
    for strength in strengths_of(own, knob):
        here = [point for point in own if point[knob] == strength]
        keys = ("reward", "kl", "best_reward", "share", "train_seconds", "train_cpu_seconds")
        rows.append({knob: strength} | {key: mean_and_error([point[key] for point in here]) for key in keys})
    return knob, rows


def name_of(point: Point) -> str:
    knob = "beta" if "beta" in point else "N"
    return f"{point['method']}, {knob} {point[knob]:g}, seed {point['seed']}"


# --- text


def head_of(results: Results) -> str:
    reference, importance = results["reference"], results["importance_weighting"]
    seeds, reward_seeds = (len({point["seed"] for point in results[key]}) for key in ("points", "overoptimisation"))
    weights = ", ".join(f"{row['median']:,.1f} at beta {row['beta']:g}" for row in importance)
    first = importance[0]
    return (
        f"{results['sizes']['held_out']} held-out prompts with {reference['leaves']:,} completions each; the "
        f"reference's hidden reward is {reference['reward']:+.3f} (standard deviation {reference['reward_std']:.2f}, "
        f"the best completion {reference['largest_reward']:+.2f}), its entropy {reference['entropy']:.2f} nats. "
        f"{seeds} seeds, {reward_seeds} of reward models; +- is one standard error over them.\n"
        f"Effective sample size of {first['draws']:,} draws from the reference, weighted by exp(r / beta), median over "
        f"prompts: {weights} (there {first['least']:,.1f} to {first['most']:,.1f} at the first)."
    )


def tables(results: Results) -> list[str]:
    names = (("reward", 16), ("KL, nats", 16), ("best there", 12), ("of gain", 12), ("s CPU", 8))
    lines = [f"{'method':<26}{'strength':>12}" + "".join(f"{name:>{width}}" for name, width in names)]
    for method in methods_of(results["points"]):
        knob, rows = rows_of(results["points"], method)
        for row in rows:
            reward, kl = (f"{row[key][0]:.3f}+-{row[key][1]:.3f}" for key in ("reward", "kl"))
            share = f"{row['share'][0]:.0%}+-{row['share'][1]:.0%}"
            lines.append(
                f"{method:<26}{f'{knob} {row[knob]:g}':>12}{reward:>16}{kl:>16}{row['best_reward'][0]:>12.3f}"
                f"{share:>12}{row['train_cpu_seconds'][0]:>8.1f}"
            )
    lines += ["", f"{'reward model of':<26}{'agreement':>12}{'gold at peak':>16}{'sqrt(KL) there':>16}{'s CPU':>8}"]
    for run in sorted(results["overoptimisation"], key=lambda run: (run["pairs"], run["seed"])):
        lines.append(
            f"{run['pairs']:>10,.0f} pairs, seed {run['seed']:<3}{run['agreement']:>12.3f}{run['peak']['gold']:>16.3f}"
            f"{run['peak']['sqrt_kl']:>16.3f}{run['train_cpu_seconds']:>8.1f}"
        )
    return lines
