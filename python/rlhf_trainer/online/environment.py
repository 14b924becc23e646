"""Completions of several turns: the model speaks, an environment answers, and so on until it is done.

An environment is an object of a class of the user's: `reset(row)` begins an episode, `step(messages)` takes the
conversation so far and returns (answers, reward, done), the answers as messages. Rewards are summed up. Tokens are kept
as they were drawn, never encoded again: those of answers are what the chat template writes of them behind a turn.
"""

import math
import random
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from ..config.functions import import_function
from ..data.chat import plain_messages
from ..data.encoding import Codec, token_ids
from ..data.examples import Prompt
from ..errors import RowError, UsageError, kind
from ..rollouts.generation import Completion, Sampling, completion_text
from ..rollouts.sampler import Failure

MARK = "@@"  # the content of a turn of the assistant's that stands for any

Draw = Callable[[Sequence[Prompt], int, Sampling], list[Completion | Failure]]  # of prompts, with a seed
Share = Callable[[Any], Any]


class Talk:
    """A prompt, and what was said after it."""

    def __init__(self, spec: str, environment: Any, prompt: Prompt, codec: Codec) -> None:
        self.spec, self.environment, self.prompt, self.codec = spec, environment, prompt, codec
        self.messages = list(prompt.prompt)
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.logprobs: list[float] = []
        self.reward, self.is_over, self.is_finished = 0.0, False, False
        self.failure: Failure | None = None
        self.call("reset", {"prompt": prompt.prompt, **prompt.columns})

    def call(self, name: str, argument: Any) -> Any:
        try:
            return getattr(self.environment, name)(argument)
        except Exception as error:  # of the user's code
            raise UsageError(
                f"environment {self.spec!r}: {name} raised {type(error).__name__}: {error} (for row {self.prompt.row})"
            ) from error

    def extended(self) -> Prompt:
        """What the model continues."""
        return self.prompt._replace(ids=self.prompt.ids + self.ids)

    def hear(self, said: Completion | Failure, longest: int) -> None:
        """Takes a turn of the model's, cut to `longest` tokens in all, and the environment's answer."""
        if isinstance(said, Failure):
            self.failure, self.is_over = said, True
            return
        room = longest - len(self.ids)
        said = Completion(said.ids[:room], said.finished and len(said.ids) <= room, said.logprobs)
        text = completion_text(self.codec.tokenizer, said, self.extended().ids)
        self.ids += said.ids
        self.learned += [True] * len(said.ids)
        self.logprobs += [math.nan] * len(said.ids) if said.logprobs is None else said.logprobs[:room]
        self.messages.append({"role": "assistant", "content": self.prompt.opened(text)})
        answers, reward, done = self.checked(self.call("step", list(self.messages)))
        self.reward += reward
        self.is_finished, self.is_over = said.finished, done or not said.finished
        if self.is_over:
            return
        between = answer_ids(self.codec, self.prompt, answers)
        if len(self.ids) + len(between) >= longest:  # no room for another turn
            self.is_finished, self.is_over = False, True
            return
        self.messages += answers
        self.ids += between
        self.learned += [False] * len(between)
        self.logprobs += [math.nan] * len(between)

    def checked(self, result: Any) -> tuple[list[dict[str, Any]], float, bool]:
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise UsageError(f"environment {self.spec!r}: step gave {kind(result)}, expected (messages, reward, done)")
        messages, reward, done = result
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise UsageError(f"environment {self.spec!r}: step gave the reward {reward!r}, expected a finite number")
        try:
            return [] if done else plain_messages(messages, "messages"), float(reward), bool(done)
        except RowError as error:
            raise UsageError(f"environment {self.spec!r}: step is not done, and its {error}") from error

    def result(self) -> Completion | Failure:
        if self.failure is not None:
            return self.failure
        own = [value for value, learned in zip(self.logprobs, self.learned, strict=True) if learned]
        logprobs = None if any(map(math.isnan, own)) else self.logprobs
        return Completion(self.ids, self.is_finished, logprobs, self.learned, self.reward)


class Environment:
    """`spec`, "module:Class", plays with every completion."""

    def __init__(self, spec: str, codec: Codec) -> None:
        self.spec, self.make, self.codec = spec, import_function(spec, "environment:"), codec
        for name in ("reset", "step"):
            if not callable(getattr(self.make, name, None)):
                raise UsageError(f"environment {spec!r} must be a class with reset(row) and step(messages)")

    def check(self, prompts: Sequence[Prompt], source: str) -> None:
        """UsageError where a prompt is no conversation, or the chat template cannot go on with one."""
        for prompt in prompts:
            if isinstance(prompt.prompt, str):
                raise UsageError(f"{source}, row {prompt.row}: environment talks in messages, and the prompt is text")
        answer_ids(self.codec, prompts[0], [{"role": "user", "content": "?"}])

    def play(
        self, prompts: Sequence[Prompt], seed: int, sampling: Sampling, draw: Draw, share: Share, *, is_main: bool
    ) -> list[Completion | Failure]:
        """A completion of each prompt, with all its turns. `draw` draws one turn of each, in all processes that play;
        `share` gives them what the main one has, which alone has environments."""
        talks = [Talk(self.spec, self.make(), prompt, self.codec) for prompt in prompts] if is_main else []
        turn, longest = 0, sampling.max_new_tokens
        while True:
            speaking = [talk for talk in talks if not talk.is_over]
            room = longest - min((len(talk.ids) for talk in speaking), default=0)
            extended, room = share(([talk.extended() for talk in speaking], room))
            if not extended:
                return share([talk.result() for talk in talks])
            own = seed if turn == 0 else random.Random(f"{seed}, turn {turn}").getrandbits(48)
            said = draw(extended, own, sampling._replace(max_new_tokens=room))
            for talk, one in zip(speaking, said, strict=is_main):
                talk.hear(one, longest)
            turn += 1


def answer_ids(codec: Codec, prompt: Prompt, answers: list[dict[str, Any]]) -> list[int]:
    """The tokens between the end of a turn of the assistant and its next turn."""
    try:
        before = [*prompt.prompt, {"role": "assistant", "content": MARK}]
        so_far = codec.template.render("environment", before, prompt.options)
        text = codec.template.text("environment", [*before, *answers], prompt.options, add_generation_prompt=True)
        _, mark, rest = so_far.rpartition(MARK)
        if not mark or not text.startswith(so_far):
            raise RowError("environment", "the chat template rewrites turns once others follow: take another one")
        ids = token_ids(codec, rest + text[len(so_far) :], "environment", with_front=False)
    except RowError as error:
        raise UsageError(str(error)) from error
    own = len(token_ids(codec, rest, "environment", with_front=False)) if rest else 0
    end = next((i for i, id in enumerate(ids[: max(own, 1)]) if id in codec.ends), -1)  # which the model has written
    return ids[end + 1 :]
