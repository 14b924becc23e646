"""The targets that rows of ops and of training steps carry, held against what was measured."""

from collections.abc import Iterator

from benchmarks.report.formatting import cell, error_of, grid, nats, short
from benchmarks.report.rows import (
    LARGER,
    NATIVE,
    Table,
    measured,
    median,
    mib_over,
    name_of,
    of,
    over_native,
    tables_of,
)

FIRST_LOSS = "first loss, from log 2"
HEAD = ["what", "native, as a ratio or in MiB", "measured", "target", "error, nats", "verdict"]
Line = tuple[list[str], bool | None]  # of the table, and whether the target holds; None where nothing is judged


def target_table(tables: list[Table], steps: list[dict]) -> list[str]:
    lines = [*op_targets(tables), *step_targets(steps)]
    if not lines:
        return []
    held, missed = (sum(holds is wanted for _, holds in lines) for wanted in (True, False))
    counts = f"{held} hold, {missed} missed."
    return ["### Targets", "", counts, "", *grid(HEAD, [line for line, _ in lines], 2)]


def line_of(what: list[str], value: float | None, most: float, error: str, otherwise: str) -> Line:
    """`otherwise`: the verdict where there is no value."""
    number = "" if value is None else nats(value) if value < 1e-3 else f"{value:.3f}" if value < 10 else short(value)
    holds = None if value is None else value <= most
    verdict = otherwise if holds is None else "holds" if holds else "**MISSED**"
    return [*what, number, f"≤ {most:.4g}", error, verdict], holds


def op_targets(tables: list[Table]) -> Iterator[Line]:
    for table in tables:
        native = of(table, NATIVE)
        for row in table:
            for what, most in row.get("targets", {}).items():
                able = row["status"] == "measured" and native is not None
                own = row is native or (what.endswith("mib") and row["contender"].startswith(NATIVE))
                value = (row.get(what) if own else measured_for(what, row, native, table)) if able else None
                against = row["contender"].removeprefix(NATIVE) if own else f" against {row['contender']}"
                case = [f"`{row['op']}` {row['dtype']}, {name_of(row)}", what.replace("_", " ") + against]
                otherwise = "not measured" if able else cell(row["status"]) if native else f"no {NATIVE}"
                yield line_of(case, value, most, error_of(native) if native else "", otherwise)


def measured_for(what: str, row: dict, native: dict, table: Table) -> float | None:
    """The subject of a target: native's part of a contender's time or memory."""
    if what in ("forward", "total"):
        return 1 / over if (over := over_native(row, native, what)) else None
    if what == "total_larger_budget":
        larger = of(table, LARGER)
        ours, theirs = larger and over_native(larger, native, "total"), over_native(row, native, "total")
        return ours / theirs if ours and theirs else None
    return 1 / over if (over := mib_over(row, native, what)) else None


def step_targets(steps: list[dict]) -> Iterator[Line]:
    for table in tables_of(steps, ("case",)):
        for ours in (step for step in table if "targets" in step):
            able = ours["status"] == "measured"
            otherwise = "not measured" if able else cell(ours["status"])
            for what, value, most in measured_steps(ours, table):
                case = [f"{ours['case']}, {ours['dtype']}, {ours['trainer']}", what]
                line, holds = line_of(case, value, most, nats(ours.get("max_loss_difference")), otherwise)
                if not ours.get("judged", True) and what != FIRST_LOSS:
                    line[-1], holds = f"not judged in {ours['dtype']}", None
                yield line, holds


def measured_steps(ours: dict, table: Table) -> Iterator[tuple[str, float | None, float]]:
    """A target's subject, the value measured, and the most that it may be."""
    targets, able = ours["targets"], {step["trainer"]: step for step in measured(table)}
    mine = able.get(ours["trainer"])
    what, rivals_of = ("gradients", targets["gradients"]) if "gradients" in targets else ("step", targets["time"])
    for rival, most in rivals_of.items():
        known = mine and rival in able
        yield f"time against {rival}", median(mine, what) / median(able[rival], what) if known else None, most
    rivals = [able[name]["peak_extra_mib"] for name in rivals_of if name in able and "fused" not in name]
    memory = mine["peak_extra_mib"] / max(min(rivals), 0.1) if mine and rivals else None
    yield "extra memory against the leaner of them", memory, targets["memory"]
    yield FIRST_LOSS, mine and mine["first_loss_error"], targets["first_loss_error"]
