"""The configurations of `rlhf pairs` and `rlhf judge`."""

import math
from dataclasses import dataclass
from typing import Literal

from ..config.base import DATA, JUDGE, OutputConfig, RowFormat, at_least
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


@dataclass(kw_only=True)
class JudgeConfig(OutputConfig):
    """Options of `rlhf judge`."""

    dataset_name: str = DATA.required("Pairs: a .jsonl, .json, .csv or .parquet file, or a hub id.", names_input=True)
    dataset_format: RowFormat = DATA.option("auto", "How rows are laid out; auto goes by their columns.")
    judge_base_url: str = JUDGE.required(
        "An OpenAI-compatible server, as http://host:8000/v1; RLHF_JUDGE_KEY in the environment is its key.",
        may_change=True,
    )
    judge_model: str = JUDGE.required("The judge's name on the server.")
    judge_template: str = JUDGE.option(
        "pairwise", "pairwise (MT-bench), reference, single (a rating), or a text file with {question} and the answers."
    )
    judge_max_tokens: int = JUDGE.option(1024, "An answer ends here at the latest, and is then unparsed.")
    judge_temperature: float = JUDGE.option(0.0, "Of the judge's answers; those asked for again have 0.7 or more.")
    judge_retries: int = JUDGE.option(2, "How often an answer without a verdict is asked for again.")
    judge_concurrency: int = JUDGE.option(16, "Requests under way at the same time.", may_change=True)
    judge_timeout: float = JUDGE.option(600.0, "Seconds to wait for an answer.", may_change=True)
    judge_max_tokens_total: int | None = JUDGE.option(
        None, "Stop when so many tokens, of prompts and answers, are spent.", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "judge_temperature", "judge_retries")
        at_least(self, 1, "judge_max_tokens", "judge_concurrency", "judge_max_tokens_total")
        if not 0 < self.judge_timeout < math.inf:
            raise UsageError(f"judge_timeout must be a positive number of seconds, got {self.judge_timeout}")
        if not self.judge_base_url.startswith(("http://", "https://")) or "@" in self.judge_base_url:
            raise UsageError(
                "judge_base_url must start with http:// or https://, without user or key: those come from "
                "RLHF_JUDGE_KEY in the environment"
            )
