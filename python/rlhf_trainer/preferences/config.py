"""The configuration of `rlhf pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config.base import DATA, OutputConfig
from ..errors import UsageError

Pairing = Literal["best_worst", "all"]
PAIRING_HELP = "Pairs of a prompt: its best completion against its worst, or all whose rewards differ."


@dataclass(kw_only=True)
class PairsConfig(OutputConfig):
    """Options of `rlhf pairs`."""

    scored: list[str] = DATA.several("Files scored.jsonl of `rlhf rejection`, or their folders.", names_input=True)
    pairing: Pairing = DATA.option("best_worst", PAIRING_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scored:
            raise UsageError("scored: name at least one file of scored completions")
