"""TRL 1.13, whose trainers ask the model for logits [B, T, V] and a few functions for what they need of them.

For the time in which a fused trainer computes log-probs or a loss, its models return per-token scores whose `.logits`
is `LogitsNeverMade`: it may be sliced and divided as TRL does, and answers what TRL asks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput
from trl.trainer import utils

from ..logprob import next_token_targets
from .lm_head import CausalLM, logit_options_of
from .scores import IGNORED, score
from .trl import (
    aux_loss_coefficient,
    forward_of,
    module_of,
    refuse_loss_of_logits,
    refuse_model,
    replaced,
    with_head_as_it_was,
)
from .trl_1_13_logits import LogitsNeverMade, entropy_from_logits, selective_log_softmax
from .versions import check_parameters

Host: Any = object  # of the mixins below: a trainer of TRL comes after them in the mro
PATCHED = "_rlhf_kernels_scores"

check_parameters(utils.selective_log_softmax, "logits, index")
check_parameters(utils.entropy_from_logits, "logits, chunk_size")


class ScoreRequest(NamedTuple):
    """The scores that models return while a trainer computes log-probs or a loss."""

    targets_of: Callable[[Mapping[str, Any]], Tensor]  # a forward's inputs -> each position's target [B, T]
    outputs: Iterator[tuple[str, ...]]  # of each forward in turn
    temperature: float = 1.0


REQUEST: ContextVar[ScoreRequest | None] = ContextVar("request", default=None)


@dataclass
class Scores(ModelOutput):
    """A model's output in that time: tensors [B, T], as wrappers of the model look for tensors in it."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    targets: Tensor | None = None
    logprobs: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    temperature: float | None = None  # never None; ModelOutput wants a default

    @property
    def logits(self) -> LogitsNeverMade:
        apart = ("loss", "aux_loss", "temperature")
        return LogitsNeverMade({k: v for k, v in self.items() if k not in apart}, self["temperature"])

    # SFT's "chunked_nll" reads these besides the loss.

    @property
    def num_valid_tokens(self) -> Tensor:
        return (self["targets"] != IGNORED).sum()

    @property
    def entropy_sum(self) -> Tensor:
        return self["entropy"].detach().sum()

    @property
    def num_correct_tokens(self) -> Tensor:
        return self["is_top1"].sum()


class Scoring(Host):
    """The part that every fused trainer has. `SEAM`: the methods it overrides, with the parameters TRL gives them."""

    SEAM: ClassVar[dict[str, str]]
    _rlhf_kernels_module: types.ModuleType

    def _refuse(self) -> None:
        refuse_model(self)
        if self.args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: Liger would compute the losses in TRL 1.13. Leave it away, or use TRL's "
                "trainer as it is"
            )

    def _add_scores(self) -> None:
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                add_scores(model.get_base_model() if hasattr(model, "get_base_model") else model)

    @contextlib.contextmanager
    def _scoring(self, request: ScoreRequest) -> Iterator[None]:
        self._refuse()
        self._add_scores()  # models that came since the last time
        token = REQUEST.set(request)
        functions = {"selective_log_softmax": selective_log_softmax, "entropy_from_logits": entropy_from_logits}
        try:
            with replaced(self._rlhf_kernels_module, **functions):
                yield
        finally:
            REQUEST.reset(token)


class DPO(Scoring):
    SEAM: ClassVar[dict[str, str]] = {
        "compute_ref_log_probs": "self, model, inputs",
        "_compute_loss": "self, model, inputs, return_outputs",
    }

    def compute_ref_log_probs(self, model: CausalLM, inputs: dict[str, Any]) -> Any:
        with self._scoring(ScoreRequest(_completions_of(inputs), itertools.repeat(()))):
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: CausalLM, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs:  # for compute_metrics or predict, which want the logits
            return super()._compute_loss(model, inputs, return_outputs)
        outputs = ("entropy", "mean_logit", "is_top1", *(("log_sum_sq_probs",) if self.use_weighting else ()))
        # The policy comes first, its reference after it.
        with self._scoring(ScoreRequest(_completions_of(inputs), itertools.chain([outputs], itertools.repeat(())))):
            return super()._compute_loss(model, inputs, return_outputs)


class PolicyGradient(Scoring):
    """GRPO and RLOO."""

    SEAM: ClassVar[dict[str, str]] = {
        "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep, batch_size, "
        "compute_entropy, ..."
    }

    def _get_per_token_logps_and_entropies(
        self,
        model: CausalLM,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        def targets_of(inputs: Mapping[str, Any]) -> Tensor:
            """Targets of a forward's rows, which are chunks of batch_size."""
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
            labels[:, :-logits_to_keep] = IGNORED
            return next_token_targets(labels, IGNORED)

        outputs = itertools.repeat(("entropy",) if compute_entropy else ())
        with self._scoring(ScoreRequest(targets_of, outputs, self.temperature)):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )


class SFT(Scoring):
    SEAM: ClassVar[dict[str, str]] = {"compute_loss": "self, model, inputs, return_outputs, num_items_in_batch"}

    def _refuse(self) -> None:
        super()._refuse()
        refuse_loss_of_logits(self, self._rlhf_kernels_module.dft_loss)

    def compute_loss(
        self,
        model: CausalLM,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if inputs.get("_prediction_loss_only") is False:  # compute_metrics or predict, which want the logits
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "shift_labels" in inputs:
            raise ValueError("context and sequence parallelism take TRL 1.15 or later here")
        targets = next_token_targets(inputs["labels"], IGNORED)
        with self._scoring(ScoreRequest(lambda _: targets, itertools.repeat(("entropy", "is_top1")))):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


MIXINS = {"DPOTrainer": DPO, "GRPOTrainer": PolicyGradient, "RLOOTrainer": PolicyGradient, "SFTTrainer": SFT}
TRAINERS = tuple(MIXINS)


def fuse(trainer: Any, base: type) -> Any:
    """A subclass of `trainer` whose models return `Scores` while it computes log-probs or a loss."""
    module, mixin = module_of(base), MIXINS[base.__name__]
    for name in ("selective_log_softmax", "entropy_from_logits"):
        if getattr(module, name) is not getattr(utils, name):
            raise ImportError(f"{module.__name__}.{name} is not that of trl.trainer.utils: another patch of it?")
    for name, parameters in mixin.SEAM.items():
        check_parameters(getattr(base, name), parameters)

    class Fused(mixin, trainer):  # type: ignore[misc, valid-type]
        _rlhf_kernels_module = module

        @functools.wraps(trainer.__init__)  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._refuse()
            self._add_scores()  # before the model is wrapped, where it was not used yet

    Fused.__name__ = Fused.__qualname__ = f"Fused{trainer.__name__}"
    return Fused


def add_scores(model: CausalLM) -> None:
    """While there is a request, `model(...)` returns `Scores`."""
    if PATCHED in vars(model):
        return
    with_head_as_it_was(model)
    options = logit_options_of(model)
    original = forward_of(model)

    @functools.wraps(type(model).forward)  # `generate` and Trainer look at its signature
    def forward(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        request = REQUEST.get()
        if request is None:
            return original(self, *args, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("labels", None)
        scored = score(
            self, options, functools.partial(original, self, *args), kwargs, request.targets_of(kwargs),
            temperature=request.temperature, outputs=next(request.outputs),
        )  # fmt: skip
        return Scores(
            loss=scored.loss(count, lambda: aux_loss_coefficient(self)),
            aux_loss=scored.aux_loss,
            targets=scored.targets,
            temperature=request.temperature,
            **scored.scores._asdict(),
        )

    model.forward = types.MethodType(forward, model)
    setattr(model, PATCHED, True)


def _completions_of(inputs: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Tensor]:
    """Targets of a batch of DPO, whose forwards take all of its rows: tokens of completions alone."""
    targets = next_token_targets(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED), IGNORED)
    return lambda _: targets
