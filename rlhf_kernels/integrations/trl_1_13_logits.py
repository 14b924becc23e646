"""An object in the place of logits [B, T, V] that were never made, for the questions that TRL 1.13 asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer import utils

from .scores import IGNORED

TARGETS = "targets"


class LogitsNeverMade:
    """Logits of tokens, known by what was computed of each: tensors [B, T], or of whatever tokens were picked.

    Slices of tokens, picked tokens, halves and the division by the temperature give another one; other questions give
    tensors, exact wherever the token counts (its target is not -100), 0 elsewhere. Everything else raises.

    Args:
        tokens: "targets" and the fields of LinearLogprobs that were computed, of the divided logits.
        divisor: what the logits still have to be divided by, so that `tokens` is about them.
        factor: what they were multiplied by since.
    """

    def __init__(self, tokens: Mapping[str, Tensor], divisor: float = 1.0, factor: float = 1.0) -> None:
        self._tokens, self._divisor, self._factor = tokens, divisor, factor

    def _each(self, change: Callable[[Tensor], Tensor]) -> LogitsNeverMade:
        return LogitsNeverMade({k: change(v) for k, v in self._tokens.items()}, self._divisor, self._factor)

    def _get(self, name: str, question: str, factor: float = 1.0) -> Tensor:
        if name not in self._tokens or self._divisor != 1.0 or self._factor != factor:
            raise _never_made(f"{question} (logits still to be divided by {self._divisor}, times {self._factor})")
        return self._tokens[name]

    def __getitem__(self, key: Any) -> LogitsNeverMade:
        if isinstance(key, Tensor) and key.dtype == torch.bool and key.shape == self._tokens[TARGETS].shape:
            return self._each(lambda x: x[key])
        whole_vocabulary = isinstance(key, tuple) and len(key) == 3 and key[-1] == slice(None)
        if not whole_vocabulary or not all(k is Ellipsis or isinstance(k, slice) for k in key):
            raise _never_made(f"[{key}]")
        return self._each(lambda x: x[key[:-1]])

    def __truediv__(self, divisor: float) -> LogitsNeverMade:
        return LogitsNeverMade(self._tokens, self._divisor / divisor, self._factor)

    def __rmul__(self, factor: float) -> LogitsNeverMade:
        return LogitsNeverMade(self._tokens, self._divisor, self._factor * factor)

    def detach(self) -> LogitsNeverMade:
        return self._each(Tensor.detach)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LogitsNeverMade, ...]:
        if dim != 0:
            raise _never_made(f"chunk(dim={dim})")
        halves = {k: v.chunk(chunks) for k, v in self._tokens.items()}
        return tuple(
            LogitsNeverMade({k: v[i] for k, v in halves.items()}, self._divisor, self._factor)
            for i in range(len(halves[TARGETS]))
        )

    def size(self, dim: int) -> int:
        if dim not in range(self._tokens[TARGETS].dim()):
            raise _never_made(f"size({dim})")
        return self._tokens[TARGETS].size(dim)

    def mean(self, dim: int) -> Tensor:
        self._along_vocabulary(dim, "mean")
        return self._get("mean_logit", "mean")

    def argmax(self, dim: int) -> Tensor:
        """The target where it is the most likely token, -1 where another one is."""
        self._along_vocabulary(dim, "argmax")
        return torch.where(self._get("is_top1", "argmax") > 0, self._tokens[TARGETS], -1)

    def logsumexp(self, dim: int) -> Tensor:
        """The logsumexp of z, and of 2 z, which is log sum_v p_v^2 + 2 logsumexp(z)."""
        self._along_vocabulary(dim, "logsumexp")
        if self._factor == 2.0:
            squares = self._get("log_sum_sq_probs", "logsumexp", 2.0)
            return squares + 2.0 * self._get("logsumexp", "logsumexp", 2.0)
        return self._get("logsumexp", "logsumexp")

    def logprobs(self, targets: Tensor) -> Tensor:
        """The log-probs of `targets`, which must be those that were scored. A tensor of its own: TRL writes into it."""
        own, logprobs = self._tokens[TARGETS], self._get("logprobs", "log-probs")
        if targets.shape != own.shape or ((targets.to(own.device) != own) & (own != IGNORED)).any():
            raise _never_made("log-probs of other tokens than those that were scored")
        return logprobs.clone()

    def entropy(self) -> Tensor:
        entropy = self._get("entropy", "entropy")
        return entropy if torch.is_grad_enabled() else entropy.detach()

    def _along_vocabulary(self, dim: int, question: str) -> None:
        if dim not in (-1, self._tokens[TARGETS].dim()):
            raise _never_made(f"{question}(dim={dim})")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(str(_never_made(name)))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        answers: dict[Any, Callable[..., Tensor]] = {torch.logsumexp: cls.logsumexp, F.cross_entropy: _cross_entropy}
        if function not in answers:
            raise _never_made(f"torch's {getattr(function, '__name__', function)}")
        return answers[function](*args, **(kwargs or {}))


def _cross_entropy(logits: LogitsNeverMade, targets: Tensor, **how: Any) -> Tensor:
    """The mean, which is all that TRL takes of it; torch passes its defaults."""
    if any(how.get(name, value) != value for name, value in (("weight", None), ("reduction", "mean"))) or any(
        how.get(name) for name in ("size_average", "reduce", "label_smoothing")
    ):
        raise _never_made(f"cross entropy with {how}")
    return -logits.logprobs(targets).mean()


def selective_log_softmax(logits: Any, index: Tensor) -> Tensor:
    """TRL's function of that name, and the same of logits that were never made."""
    if isinstance(logits, LogitsNeverMade):
        return logits.logprobs(index)
    return utils.selective_log_softmax(logits, index)


def entropy_from_logits(logits: Any, chunk_size: int = 128) -> Tensor:
    """TRL's function of that name, and the same of logits that were never made."""
    if isinstance(logits, LogitsNeverMade):
        return logits.entropy()
    return utils.entropy_from_logits(logits, chunk_size)


def _never_made(question: str) -> TypeError:
    return TypeError(
        f"{question}: asked of logits that were never made. A trainer of fused() knows log-probs, entropy, mean, "
        "argmax and logsumexp of each token; what needs more of them takes TRL's trainer as it is"
    )
