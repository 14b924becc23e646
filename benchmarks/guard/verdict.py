"""Verdicts on paired times of two sides: a ratio with an interval.

- Ratio: head / base of the same round; the median of all rounds counts. What disturbs the machine for longer than a
  round falls on both and cancels.
- Interval: where the median of such ratios lies, with 99% confidence, by counting alone: so many of n ratios lie below
  their true median as heads fall in n throws of a coin. Nothing is assumed about how times are distributed.
- Sets: processes are started anew for every set of rounds, as equal ones differ by how they happen to lie in memory.
- SLOWER: even the lower end of the interval, and every set's median, is above 1 + BOUND. faster: the upper end, and
  every set's median, is below 1 - BOUND. "cannot tell": interval and sets leave room for a slowdown of 5%. ok: they
  do not.
- Instructions: head / base of one run. They hardly vary, so 2% more is a finding ("more instructions"). It decides only
  where the times cannot tell.
"""

import math
import statistics

CONFIDENCE = 0.99
BOUND = 0.02  # by so much equal sides may differ
TO_BE_SEEN = 0.05  # a slowdown that could not be seen makes the answer "cannot tell"
MORE_INSTRUCTIONS = 1.02
LEAST_ROUNDS = 8  # of a case over all sets: fewer bear no interval of 99%

Round = tuple[float, float]  # seconds of base, head


Interval = tuple[float, float, float]  # low, median, high


def median_interval(ratios: list[float], confidence: float = CONFIDENCE) -> Interval:
    """The ratios' median, and the order statistics between which the true one lies with at least this confidence."""
    ordered, n = sorted(ratios), len(ratios)
    outside, below = (1 - confidence) / 2, 0  # `below`: ratios that may be left out at either end
    subsets = 1  # of at most `below` of n; whole numbers, as 2**n leaves the floats at n = 1024
    while subsets / 2**n <= outside:
        below += 1
        subsets += math.comb(n, below)
    low, high = (ordered[below - 1], ordered[n - below]) if below else (0.0, math.inf)
    return low, statistics.median(ordered), high


def judge(sets: list[list[Round]]) -> tuple[Interval, str]:
    """The ratio and the verdict of sets of rounds, each set measured by other processes."""
    ratios = [[head / base for base, head in rounds] for rounds in sets]
    medians = [statistics.median(of_set) for of_set in ratios]
    interval = median_interval([ratio for of_set in ratios for ratio in of_set])
    if min(*interval, *medians) > 1 + BOUND:
        return interval, "SLOWER"
    if max(*interval, *medians) < 1 - BOUND:
        return interval, "faster"
    return interval, "cannot tell" if max(*interval, *medians) > 1 + TO_BE_SEEN else "ok"


def with_instructions(verdict: str, instructions: float | None) -> str:
    if instructions is None or instructions <= MORE_INSTRUCTIONS:
        return verdict
    return "MORE INSTRUCTIONS" if verdict == "cannot tell" else f"{verdict}, more instructions"


def is_bad(verdict: str) -> bool:
    """It turns the exit status: slower, or head no longer runs the case."""
    return verdict.startswith(("SLOWER", "MORE INSTRUCTIONS", "head cannot"))
