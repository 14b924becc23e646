"""The best evaluation of a run: its weights are kept, and after some that are no better the run ends."""

import math
from typing import Any

from ..config.base import TrainConfig
from ..errors import UsageError
from .task import Metrics

PREFIX = "eval/"


class Best:
    """`step` of the best evaluation so far, None before the first; `waited`: how many have been no better since."""

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None) -> None:
        """`state`: of a resumed run, what `state` was."""
        self.config = config
        self.step: int | None = None
        self.value, self.waited = math.nan, 0
        if state is not None:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]

    @property
    def state(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "waited": self.waited}

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better one."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.waited >= patience

    def takes(self, step: int, metrics: Metrics) -> bool:
        """Whether the evaluation in the step's metrics, if there is one, is the best so far."""
        evaluated = {name.removeprefix(PREFIX): value for name, value in metrics.items() if name.startswith(PREFIX)}
        if not evaluated:
            return False
        default = "loss" if "loss" in evaluated else "reward"
        name = (self.config.metric_for_best_model or default).removeprefix("eval_").removeprefix(PREFIX)
        if name not in evaluated:
            raise UsageError(f"metric_for_best_model: expected one of {', '.join(sorted(evaluated))}; got {name!r}")
        greater = self.config.greater_is_better
        sign = 1 if (not name.endswith("loss") if greater is None else greater) else -1
        is_best = self.step is None or sign * evaluated[name] > sign * self.value
        if is_best:
            self.step, self.value = step, evaluated[name]
        self.waited = 0 if is_best else self.waited + 1
        return is_best
