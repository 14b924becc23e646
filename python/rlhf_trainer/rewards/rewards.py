"""Rewards of completions: reward models, verifiable rewards and functions of the user's own, as a weighted sum.

A reward is named by text, "regex:PATTERN" say: docs/trainer.md has a table of the names, and loading.py reads them.

A user's function has TRL's signature, `f(prompts, completions, **columns) -> list of numbers`: it is called once with
all prompts and completions, text or messages as in the data, and the other columns of their rows, each a list with
None where a row lacks it. Of these it gets what its parameters ask for; `**kwargs` asks for everything. None in place
of a number abstains: that completion's reward is the sum of the other functions', of which one must have a value.
Functions that are `async def` are all awaited together, while the others run.
"""

import asyncio
import inspect
import math
import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import repeat
from numbers import Real
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.completions import text_of
from ..data.encoding import like_prompt
from ..data.examples import Prompt
from ..errors import UsageError, kind
from ..training.journal import RunBatch, compute_only
from .model_rewards import ModelReward
from .verifiable import Verifiable

LARGEST = torch.finfo(torch.float32).max


class Scores(NamedTuple):
    """Rewards of N completions by K functions, fp32 on the CPU."""

    total: Tensor  # [N], the sum of parts times weights, of those that are there
    parts: Tensor  # [N, K], without weights; NaN where a function abstained


class Reward(Protocol):
    """One of the functions; `name` is for metrics, `batch_count` says how often `run` will be called."""

    name: str

    def check(self, prompts: Sequence[Prompt], source: str, max_completion_length: int) -> None: ...

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int: ...

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], run: RunBatch) -> Any: ...


class Rewards:
    """Functions and their weights. `names`: one a function, a repeated one with -2, -3, ... behind it."""

    def __init__(self, functions: Sequence[Reward], weights: Sequence[float]) -> None:
        names = [function.name for function in functions]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        self.names = tuple(f"{name}-{n + 1}" if n else name for name, n in zip(names, earlier, strict=True))
        self.functions, self.weights = list(functions), list(weights)

    @property
    def models(self) -> list[ModelReward]:
        return [function for function in self.functions if isinstance(function, ModelReward)]

    def check(self, prompts: Sequence[Prompt], source: str = "the prompts", max_completion_length: int = 0) -> None:
        """UsageError where a row lacks what a function needs, or is too long for a model with so many tokens more."""
        for function in self.functions:
            function.check(prompts, source, max_completion_length)

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int:
        """The number of calls of `run`."""
        return sum(function.batch_count(prompts, texts) for function in self.functions)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], *, run: RunBatch = compute_only) -> Scores:
        """Rewards of texts [N], each the completion of the prompt at its place; `run` runs each batch of the work."""
        if len(prompts) != len(texts):
            raise ValueError(f"expected a text for each prompt, got {len(texts)} for {len(prompts)}")
        columns: list[list[float]] = [[] for _ in self.functions]
        left = [function for function in self.functions if isinstance(function, UserReward) and function.is_async]

        def beside_those_left(compute: Callable[[], Any]) -> Any:
            for function in left:
                function.start(prompts, texts)
            return compute()

        def run_beside(compute: Callable[[], Any]) -> Any:
            return run(lambda: beside_those_left(compute))  # a result that was kept starts none

        try:
            for k in sorted(range(len(columns)), key=lambda k: self.functions[k] in left):  # async functions last
                values = self.functions[k](prompts, texts, run_beside) if prompts else []
                columns[k] = [math.nan if v is None else v for v in checked(self.names[k], values, prompts)]
                left = [function for function in left if function is not self.functions[k]]
        finally:
            for function in left:
                function.stop()
        parts = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), len(prompts)).T.contiguous()
        silent = parts.isnan().all(dim=1).nonzero().flatten().tolist()
        if silent and columns:
            raise UsageError(
                f"no reward function has a value for a completion of {where(prompts[silent[0]])}: each gave None "
                f"({', '.join(self.names)}); of every completion at least one must give a number"
            )
        return Scores(parts.nan_to_num() @ torch.tensor(self.weights, dtype=torch.float32), parts)


class RowReward:
    """A verifiable reward, of a text and a column of the row."""

    def __init__(self, name: str, verifiable: Verifiable) -> None:
        self.name, self.verifiable = name, verifiable

    def check(self, prompts: Sequence[Prompt], source: str, max_completion_length: int) -> None:
        for prompt in prompts:
            self.expected(prompt, source)

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int:
        return 1

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], run: RunBatch) -> list[float]:
        expected, texts = [self.expected(prompt) for prompt in prompts], list(map(Prompt.opened, prompts, texts))

        def score() -> list[float]:
            if not self.verifiable.is_slow:
                return list(map(self.verifiable.score, texts, expected))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(self.verifiable.score, texts, expected))

        return run(score)

    def expected(self, prompt: Prompt, source: str = "the prompts") -> Any:
        """The row's value, as the function wants it."""
        columns = self.verifiable.columns
        if not columns:
            return None
        column = next((column for column in columns if prompt.columns.get(column) is not None), None)
        if column is None:
            wanted = f"{' or '.join(map(repr, columns))}, {self.verifiable.what}"
            raise UsageError(
                f"{source}, {where(prompt)}: the reward {self.name!r} needs a column {wanted}; the row has: "
                f"{', '.join(prompt.columns) or 'the prompt only'}"
            )
        try:
            return self.verifiable.prepare(prompt.columns[column])
        except ValueError as error:
            raise UsageError(
                f"{source}, {where(prompt)}: the reward {self.name!r} cannot use column {column!r}: {error}"
            ) from error


class UserReward:
    """A function of the user's. Where it raises, it is called again, prompt by prompt, to tell with which one.
    An async one may be started before it is called."""

    def __init__(self, spec: str, function: Callable[..., Any]) -> None:
        self.spec, self.function = spec, function
        self.is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
        self.started: Future[Any] | None = None
        self.name = spec.partition(":")[2]
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise UsageError(f"reward_funcs: {spec!r}: cannot tell what it takes: {error}") from error
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if positional:
            raise UsageError(
                f"reward_funcs: {spec!r} must take {positional[0]!r} by name: f(prompts, completions, **columns)"
            )
        self.parameters = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty and p.name not in ("prompts", "completions")]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def check(self, prompts: Sequence[Prompt], source: str, max_completion_length: int) -> None:
        for name in self.needed:
            if not any(name in prompt.columns for prompt in prompts):
                known = dict.fromkeys(column for prompt in prompts for column in prompt.columns)
                raise UsageError(
                    f"{source}: the reward {self.spec!r} asks for a column {name!r}, which no row has; they have: "
                    f"{', '.join(known) or 'the prompt only'}. Give the parameter a default, or the rows the column"
                )

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int:
        return 1

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], run: RunBatch) -> list[float | None]:
        return run(lambda: checked(self.spec, self.values(prompts, texts), prompts))

    def values(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        try:
            if not self.is_async:
                return self.call(prompts, texts)
            self.start(prompts, texts)
            started, self.started = self.started, None
            return started.result()
        except (Exception, SystemExit) as error:
            if len(prompts) > 1:
                for prompt, text in zip(prompts, texts, strict=True):
                    self.values([prompt], [text])
            place = where(prompts[0]) if len(prompts) == 1 else "all prompts together"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"the reward function {self.spec!r} raised {type(error).__name__}: {error} (for {place}; "
                f"{frame.filename}:{frame.lineno}, in {frame.name})"
            ) from error

    def start(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
        if self.started is None:
            self.started = asyncio.run_coroutine_threadsafe(self.call(prompts, texts), event_loop())

    def stop(self) -> None:
        if self.started is not None:
            self.started.cancel()
            self.started = None

    def call(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
        names = [*dict.fromkeys(name for prompt in prompts for name in prompt.columns), *self.needed]
        arguments = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        arguments["prompts"] = [prompt.prompt for prompt in prompts]
        arguments["completions"] = list(map(like_prompt, arguments["prompts"], map(Prompt.opened, prompts, texts)))
        takes = [name for name in arguments if self.takes_all or name in self.parameters]
        return self.function(**{name: arguments[name] for name in takes})


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Of all async functions, for the life of the process: they may keep a client, whose connections belong to it."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            with suppress(SystemExit):  # of a function; its caller has it, too
                loop.run_forever()

    Thread(target=run, name="async reward functions", daemon=True).start()
    return loop


def checked(name: str, values: Any, prompts: Sequence[Prompt]) -> list[float | None]:
    """values as a function gave them -> a finite number, or None, for each prompt; UsageError naming function and
    prompt."""
    values = values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array
    if not isinstance(values, list | tuple):
        raise UsageError(
            f"the reward function {name!r} gave {kind(values)}, expected a list of {len(prompts)} numbers, one for "
            f"each completion (the first for {where(prompts[0])})"
        )
    if len(values) != len(prompts):
        raise UsageError(
            f"the reward function {name!r} gave {len(values)} values for {len(prompts)} completions (of prompts from "
            f"{where(prompts[0])} to {where(prompts[-1])})"
        )
    return list(map(number, repeat(name), values, prompts))


def number(name: str, value: Any, prompt: Prompt) -> float | None:
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or abs(value) > LARGEST or not math.isfinite(value):
        raise UsageError(
            f"the reward function {name!r} gave {kind(value)}, expected a finite number (for {where(prompt)})"
        )
    return float(value)


def where(prompt: Prompt) -> str:
    """A prompt, shortened, for messages about it."""
    text = text_of(prompt.prompt)
    return f"row {prompt.row}, prompt {text if len(text) <= 60 else text[:57] + '...'!r}"
