"""Fewer combinations than a full product, where none but pairs of values may matter together."""

import itertools


def every_pair(*dimensions):
    """Rows with a value of each dimension, such that any two values of two dimensions meet in some row. Greedy, so few
    but not the fewest; always the same ones."""
    dimensions = [list(values) for values in dimensions]
    rows = list(itertools.product(*(range(len(values)) for values in dimensions)))
    places = list(itertools.combinations(range(len(dimensions)), 2))

    def pairs(row):
        return {(a, b, row[a], row[b]) for a, b in places}

    chosen, missing = [], set().union(*map(pairs, rows))
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return [tuple(values[i] for values, i in zip(dimensions, row, strict=True)) for row in sorted(chosen)]
