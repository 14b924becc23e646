"""The tables of docs/performance.md on training steps: whole ones, and each `case` that measures a part of them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.pictures import Table, measured, median, short, tables_of
from benchmarks.report.words import cell, grid, nats, spread

OURS = "rlhf"  # and its variants, "rlhf, ..."
WHOLE = "Whole training steps"
FIRST_LOSS = "first loss, from log 2"
GRADIENTS = (
    "The reference's forward, the policy's forward and its backward, without clipping, update or batching; extra MiB "
    "are those above weights, gradients and optimizer state. `rlhf dpo` runs the reference once, before training: its "
    "pass over a step's pairs is added to that step."
)


def is_ours(step: dict) -> bool:
    return step["trainer"].partition(",")[0] == OURS


def cases_of(steps: list[dict]) -> list[Table]:
    """Whole steps first."""
    return sorted(tables_of(steps, ("case",)), key=lambda table: bool(table[0].get("case")))


def step_tables(steps: list[dict]) -> list[str]:
    return [line for table in cases_of(steps) for line in step_table(table)]


def step_table(steps: Table) -> list[str]:
    lines, case = [], steps[0].get("case")
    able = measured(steps)
    unjudged = [step["trainer"] for step in able if step.get("max_loss_difference") is None]
    if len(unjudged) > 1:  # one of them is what the others differ from
        raise ValueError(f"measured without a difference of losses, so not printed: {', '.join(unjudged)}")
    ours_mib = next((step["peak_extra_mib"] for step in able if step["trainer"] == OURS), None) or 0.0
    head = ["trainer", "a step, × rlhf", "spread", "extra MiB", "largest difference of losses"]
    head += ["processor time, × rlhf", FIRST_LOSS] if case else []
    for step in steps:
        if step["status"] != "measured":
            lines.append([f"{step['trainer']}: {cell(step['status'])}", *[""] * (len(head) - 1)])
            continue
        over = 1.0 if step["trainer"] == OURS else step.get("over_rlhf")
        less = step.get("peak_extra_mib", ours_mib) < ours_mib
        better = [what for what, wins in (("time", (over or 1.0) < 1.0), ("memory", less)) if wins]
        beats = f" ▲ beats rlhf: {', '.join(better)}" if better and not is_ours(step) else ""
        memory = "" if step.get("peak_extra_mib") is None else f"{step['peak_extra_mib']:,.0f}"
        difference = nats(step.get("max_loss_difference")) or "what the others differ from"
        line = [f"{step['trainer']}{beats}", short(over), spread(step.get("step_ms")), memory, difference]
        lines.append(line + ([short(step.get("cpu_over_rlhf")), nats(step.get("first_loss_error"))] if case else []))
    first = (able or steps)[0]
    sizes = first.get("model", {})
    model = ", ".join(f"{name} {value}" for name, value in sizes.items()) if isinstance(sizes, dict) else sizes
    said = [first.get("dtype", ""), f"model: {model}" if model else ""]
    said += [f"{name}: {first[name]}" for name in ("batch", "rounds") if first.get(name)]
    about = [f"{'; '.join(word for word in said if word)}.", ""] + ([GRADIENTS, ""] if case else [])
    return [f"### {case or WHOLE}", "", *about, *grid(head, lines)]


def step_targets(steps: list[dict]) -> Iterator[tuple[list[str], bool | None]]:
    """Lines of the table of targets, and whether they hold; None where nothing is judged."""
    for table in cases_of(steps):
        for ours in (step for step in table if "targets" in step):
            for what, found, most in found_of(ours, table):
                said = [f"{ours.get('case', WHOLE)}, {ours['dtype']}, {ours['trainer']}", what]
                number = "" if found is None else nats(found) if found < 1e-3 else f"{found:.3f}"
                holds = None if found is None else found <= most
                verdict = "holds" if holds else "**MISSED**"
                if holds is None:
                    verdict = "not measured" if ours["status"] == "measured" else cell(ours["status"])
                elif not ours.get("judged", True) and what != FIRST_LOSS:
                    holds, verdict = None, f"not judged in {ours['dtype']}"
                yield [*said, number, f"≤ {most:.4g}", nats(ours.get("max_loss_difference")), verdict], holds


def found_of(ours: dict, table: Table) -> Iterator[tuple[str, float | None, float]]:
    """What a target is of, what was measured, and the most that it may be."""
    targets, able = ours["targets"], {step["trainer"]: step for step in measured(table)}
    mine = able.get(ours["trainer"])
    for rival, most in targets.get("time", {}).items():
        known = mine and rival in able
        yield f"time against {rival}", median(mine, "step") / median(able[rival], "step") if known else None, most
    if "memory" in targets:
        rivals = [able[name]["peak_extra_mib"] for name in targets.get("time", {}) if name in able]
        found = mine["peak_extra_mib"] / max(min(rivals), 0.1) if mine and rivals else None
        yield "extra memory against the leaner of them", found, targets["memory"]
    if "first_loss_error" in targets:
        yield FIRST_LOSS, mine and mine["first_loss_error"], targets["first_loss_error"]
