"""Rows of results: whose they are, how they compare with native's, and which of them make a table."""

from benchmarks.harness.case import CASE_KEY
from benchmarks.harness.measuring import BARE
from benchmarks.harness.peers import is_ours as is_backend

NATIVE = "native"
LARGER = f"{NATIVE}, larger budget"
Table = list[dict]  # rows of one op at one shape, which took turns


def is_ours(row: dict) -> bool:
    return is_backend(row["contender"])


def is_peer(row: dict) -> bool:
    return not is_ours(row) and row["contender"] != BARE


def measured(table: Table) -> Table:
    return [row for row in table if row["status"] == "measured"]


def of(table: Table, contender: str) -> dict | None:
    """The row of one contender, if it was measured."""
    return next((row for row in measured(table) if row["contender"] == contender), None)


def median(row: dict, what: str) -> float | None:
    times = row.get(f"{what}_ms")
    return times["median"] if times else None


def over_native(row: dict, native: dict | None, what: str) -> float | None:
    if row is native:
        return 1.0 if median(row, what) else None
    if what in row.get("over_native", {}):
        return row["over_native"][what]
    if native is None or not median(row, what) or not median(native, what):
        return None
    return median(row, what) / median(native, what)


def mib_over(row: dict, native: dict, column: str = "peak_total_mib") -> float | None:
    known = row.get(column) is not None and native.get(column) is not None
    return row[column] / max(native[column], 0.1) if known else None  # a tenth of a MiB is the last digit that is kept


def wins(row: dict, native: dict | None) -> list[str]:
    """In what a contender beats native."""
    if native is None or not is_peer(row) or row["status"] != "measured":
        return []
    ratios = {what: over_native(row, native, what) for what in ("forward", "total")}
    ratios["forward memory"] = mib_over(row, native, "peak_forward_mib")
    ratios["memory"] = mib_over(row, native)
    return [what for what, ratio in ratios.items() if ratio is not None and ratio < 1.0]


def in_order(table: Table, native: dict | None) -> Table:
    """Bare GEMMs, ours, then the others from fast to slow, then those that could not."""

    def place(row: dict) -> tuple:
        rank = 3 if row["status"] != "measured" else 0 if row["contender"] == BARE else 1 if is_ours(row) else 2
        time = over_native(row, native, "total") if rank == 2 else 0.0
        return rank, time if time is not None else float("inf")

    return sorted(table, key=place)


def tables_of(rows: list[dict], key: tuple[str, ...] = CASE_KEY) -> list[Table]:
    tables: dict[tuple, Table] = {}
    for row in rows:
        tables.setdefault(tuple(row.get(name) or "" for name in key), []).append(row)
    return list(tables.values())


def shape(row: dict) -> str:
    tokens = f"{row['s']}x{row['t']}" if row.get("s") and row.get("t") else str(row["n"])
    masked = f", {row['masked']:.0%} masked" if row.get("masked") else ""
    capped = f", soft cap {row['softcap']:g}" if row.get("softcap") else ""
    pairs = f", {each} pairs a response" if (each := row.get("pairs_per_response") or 1) > 1 else ""
    frozen = ", frozen head" if row.get("frozen") else ""
    return f"{tokens}x{row['d']}x{row['v']}{masked}{frozen}{capped}{pairs}"


def name_of(row: dict) -> str:
    return f"{row['model']}, {shape(row)}" if row.get("model") else shape(row)
