"""TRL 1.15 and 1.16: every trainer's constructor hands its models to `add_fused_lm_head`, which makes
`model(..., labels=labels, fused_lm_head=True)` return per-token scores. Here it is ours for that time."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from trl.trainer import utils

from ..logprob import next_token_targets
from .lm_head import CausalLM, logit_options_of
from .lora import is_lora
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
from .versions import check_parameters

TRAINERS = ("DPOTrainer", "GRPOTrainer", "RLOOTrainer", "SFTTrainer", "KTOTrainer")

# TRL's names of outputs -> those of rlhf_kernels.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}

check_parameters(utils.add_fused_lm_head, "model, temperature, cast_lm_head_to_fp32, outputs")
check_parameters(
    utils.FusedCausalLMOutput, "loss, log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1, label_mask, aux_loss"
)


class NoHead:
    """TRL refuses heads that are a BaseTunerLayer, whose adapter it would leave out. Here it is computed; so while the
    constructor looks, heads are none."""


def fuse(trainer: Any, base: type) -> Any:
    """A subclass of `trainer`, whose constructor calls `add_logprobs` in the place of TRL's function."""
    module = module_of(base)
    if module.add_fused_lm_head is not utils.add_fused_lm_head:
        raise ImportError(f"{module.__name__}.add_fused_lm_head is not that of trl.trainer.utils: another patch of it?")

    class Fused(trainer):
        @functools.wraps(trainer.__init__)  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            @functools.wraps(utils.add_fused_lm_head)
            def add(model: CausalLM, *options: Any, **named: Any) -> None:
                refuse_model(self)
                if base.__name__ == "SFTTrainer":
                    refuse_loss_of_logits(self)
                add_logprobs(model, *options, **named)

            seam: dict[str, Any] = {"add_fused_lm_head": add}
            if hasattr(module, "BaseTunerLayer"):  # where peft is installed
                seam["BaseTunerLayer"] = NoHead
            with replaced(module, **seam):
                super().__init__(*args, **kwargs)

    Fused.__name__ = Fused.__qualname__ = f"Fused{trainer.__name__}"
    return Fused


def add_logprobs(
    model: CausalLM,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`model(..., fused_lm_head=True)` returns TRL's FusedCausalLMOutput, as `trl.trainer.utils.add_fused_lm_head`
    makes it do; scored by rlhf_kernels inside the head's own call. Tokens that are not labels cost no matmul."""
    unknown = set(outputs) - {"log_probs", *OUTPUTS}
    if unknown:
        raise ValueError(f"outputs {sorted(unknown)} are not known, expected some of {['log_probs', *OUTPUTS]}")
    if cast_lm_head_to_fp32 and is_lora(model.get_output_embeddings()):
        raise ValueError("cast_lm_head_to_fp32=True does not go with an adapter on the LM head: leave one of them out")
    with_head_as_it_was(model)
    options = logit_options_of(model)
    original = forward_of(model)
    wanted = {theirs: ours for theirs, ours in OUTPUTS.items() if theirs in outputs}

    @functools.wraps(type(model).forward)  # `generate` and Trainer look at its signature
    def forward(
        self: CausalLM,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            labelling = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(self, *args, **{k: v for k, v in labelling.items() if v is not None}, **kwargs)
        if shift_labels is not None:
            targets, end = shift_labels, None
        elif labels is not None:
            targets, end = next_token_targets(labels, IGNORED), -1  # TRL leaves out the last, which predicts nothing
        else:
            raise ValueError("fused_lm_head=True needs labels or shift_labels")
        scored = score(
            self, options, functools.partial(original, self, *args), kwargs, targets, temperature=temperature,
            outputs=tuple(wanted.values()), fp32=cast_lm_head_to_fp32,
        )  # fmt: skip
        tokens = {theirs: getattr(scored.scores, ours)[:, :end] for theirs, ours in wanted.items()}
        if "is_top1" in tokens:
            tokens["is_top1"] = tokens["is_top1"] > 0
        return utils.FusedCausalLMOutput(
            loss=scored.loss(num_items_in_batch, lambda: aux_loss_coefficient(self)),
            log_probs=scored.scores.logprobs[:, :end],
            label_mask=scored.mask[:, :end],
            aux_loss=scored.aux_loss,
            **tokens,
        )

    model.forward = types.MethodType(forward, model)
