"""One command's examples, their plan, and their loss; and the metrics of a batch that is split into micro-batches."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .batch_plan import MicroBatch, Share, share_of_process

Metrics = dict[str, float]


class LossOutput(NamedTuple):
    """A micro-batch's mean loss, and its share of the batch's metrics: scalars without gradient."""

    loss: Tensor  # scalar, with gradient
    metrics: dict[str, Tensor]  # means over what the task counts
    tokens: Tensor  # how many went through the model
    minima: Mapping[str, Tensor] = MappingProxyType({})  # metrics that are the smallest over the batch
    maxima: Mapping[str, Tensor] = MappingProxyType({})


def with_aux_loss(output: LossOutput, balanced: Sequence[nn.Module]) -> LossOutput:
    """The output with the balancing losses of mixtures of experts, each of the last call of its module, by their
    coefficients."""
    for module in balanced:
        aux_loss = module.aux_loss.detach()
        metrics = output.metrics | {"loss": output.metrics["loss"] + module.aux_coefficient * aux_loss}
        loss = output.loss + module.aux_coefficient * module.aux_loss
        output = output._replace(loss=loss, metrics=metrics | {"aux_loss": aux_loss})
    return output


class Task(ABC):
    """Examples, and their loss. `plan`: batches of micro-batches; `counts` [N]: each example's weight in the means of
    loss and metrics, such as its pairs or its tokens; `together`: so many neighbouring processes run a micro-batch,
    each a part of its sequences, and metrics and tokens are shares of these that sum to the whole."""

    noun = "prompts with pairs"  # the examples, for messages
    idle: Set[int] = frozenset()  # examples whose loss has no gradient

    def __init__(
        self, plan: list[list[MicroBatch]], counts: Sequence[float], device: torch.device, together: int = 1
    ) -> None:
        self.plan, self.counts, self.device, self.together = plan, counts, device, together

    @abstractmethod
    def compute_loss(self, model: nn.Module, indices: MicroBatch) -> LossOutput:
        """The loss of these examples under `model`, which may be wrapped."""

    @abstractmethod
    def examples(self, indices: MicroBatch) -> list[Any]:
        """NamedTuples with `row`, for a person who looks for a mistake in them."""

    def depends_on(self) -> bytes:
        """Bytes of all that determines the loss beside the examples and the model."""
        return b""

    def shares(self, batch: list[MicroBatch], accelerator: Accelerator) -> list[Share]:
        """The micro-batches of a batch that this process runs, and their weights in the batch's means."""
        rank, world = accelerator.process_index // self.together, accelerator.num_processes // self.together
        return share_of_process(batch, rank, world, self.counts)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Metrics:
        """The metrics over all examples."""
        totals, count = Totals(), sum(self.counts)
        for batch in self.plan:
            part = sum(self.counts[i] for micro in batch for i in micro) / count
            for share in self.shares(batch, accelerator):
                totals.add(self.compute_loss(model, share.indices), part * share.weight)
        return totals.reduce(accelerator)[0]


class Totals:
    """The metrics of micro-batches, folded over a batch and all processes."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.minima: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.tokens: Tensor | float = 0.0

    def add(self, output: LossOutput, weight: float) -> None:
        """Folds a micro-batch in. Of `weight` 0 is one that another process has too, run to stay in step: it counts
        nothing."""
        self.tokens = self.tokens + output.tokens.float() * (weight > 0)
        scaled = {name: value.float() * weight for name, value in output.metrics.items()}
        for totals, fold, neutral, values in (
            (self.means, torch.add, 0.0, scaled),
            (self.minima, torch.minimum, math.inf, output.minima),
            (self.maxima, torch.maximum, -math.inf, output.maxima),
        ):
            for name, value in values.items():
                value = value.float() if weight else torch.full_like(value, neutral, dtype=torch.float32)
                totals[name] = fold(totals[name], value) if name in totals else value

    def reduce(self, accelerator: Accelerator) -> tuple[Metrics, float]:
        """The metrics, and the number of tokens."""
        *means, tokens = accelerator.reduce(torch.stack([*self.means.values(), self.tokens]), "sum").tolist()
        metrics = dict(zip(self.means, means, strict=True))
        for folded, fold in ((self.minima, torch.amin), (self.maxima, torch.amax)):
            if folded:
                everywhere = accelerator.gather(torch.stack(list(folded.values()))[None])
                metrics |= zip(folded, fold(everywhere, 0).tolist(), strict=True)
        return metrics, tokens
