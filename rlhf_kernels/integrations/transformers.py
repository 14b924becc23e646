"""Causal language models of transformers whose forward returns log-probabilities instead of logits."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from ..logprob import next_token_targets
from .lm_head import (
    CausalLM,
    LMHead,
    LogitOptions,
    forward_of_known_logits,
    lm_head_of,
    logit_options_of,
    replaced_forward,
    run_in_head,
)
from .scores import IGNORED, aux_loss_coefficient, refuse_prompt_learning, score

__all__ = [
    "CausalLMLogprobs",
    "LMHead",
    "LogitOptions",
    "lm_head_of",
    "logit_options_of",
    "logprobs_of",
    "nll_loss",
    "patch_causal_lm",
    "run_in_head",
    "with_shift_labels",
]


@dataclass
class CausalLMLogprobs(ModelOutput):
    """A patched model's output. Tensors of a token are [B, T], fp32, in nats, and exactly 0 where not counted.

    loss: scalar; the sum of -logprobs over `num_items_in_batch`, or over the number of tokens that count; with router
        logits plus the model's load-balancing loss times its coefficient.
    logprobs: position t holds log p(label t + 1 | up to t), the last one 0; with `shift_labels` that of its own label.
    entropy, is_top1, mean_logit, log_sum_sq_probs: as in `rlhf_kernels.linear_logprobs`, None if not in `outputs`.
    token_mask: bool, where a label counts.
    """

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    token_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def patch_causal_lm(
    model: CausalLM,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    logit_options: LogitOptions | None = None,
) -> CausalLM:
    """Gives `model.forward` a path that returns `CausalLMLogprobs` and never makes `[tokens, vocab]` logits.

        model = patch_causal_lm(model)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)  # through whatever wraps the model
        out.logprobs, out.loss

    It is taken when `labels` ([B, T], Hugging Face's convention: -100 where masked, shifted inside) or `shift_labels`
    ([B, T], targets of their own positions) are not None. Everything else, generation say, is the model's own forward;
    `logprobs=False` takes that with labels too. The call also takes `num_items_in_batch`, and `temperature` and
    `outputs` in place of the arguments here. A deep copy is patched like the model; a pickled copy is not.

    Args:
        model: a causal LM of transformers, before DDP, FSDP or DeepSpeed wrap it (patch, wrap, call the wrapper). With
            adapters of peft: the PeftModel or its base model, before or after the adapters come.
        temperature, outputs, backend: as in `rlhf_kernels.linear_logprobs`.
        logit_options: scale and soft cap of its logits; None asks the model for them and for its loss, by forwards of
            four tokens, in the mode that it is in. Give them where that cannot run, because weights are not there yet
            (ZeRO-3's zero.Init, the meta device).

    Returns: the same model.

    Raises ValueError: the head is no linear layer (or carries an adapter that is more than a low-rank term, DoRA say),
    its logits are not what the config says, its loss is not the next-token one, prompt learning (its virtual tokens
    come between labels and hidden states; looked for here alone), a forward that was replaced before.
    """
    refuse_prompt_learning(model)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse_other_models(causal_lm)
    options = logit_options
    if options is None:
        options = logit_options_of(causal_lm)
        _refuse_another_loss(causal_lm)
    default_temperature, default_outputs = temperature, tuple(outputs)
    original = type(causal_lm).forward

    def forward(
        self: CausalLM,
        *args: Any,
        logprobs: bool | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        temperature: float | None = None,
        outputs: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        labelled = labels is not None or shift_labels is not None
        if not (labelled if logprobs is None else logprobs):
            labelling = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(self, *args, **{k: v for k, v in labelling.items() if v is not None}, **kwargs)
        return logprobs_of(
            self,
            options,
            functools.partial(original, self, *args),
            kwargs,
            labels=labels,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            temperature=default_temperature if temperature is None else temperature,
            outputs=default_outputs if outputs is None else outputs,
            backend=backend,
        )

    causal_lm.forward = types.MethodType(_looking_like(original, forward), causal_lm)
    return model


def _looking_like(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, with the name and signature of `original`, which `generate` and Trainer look at, and `shift_labels`.

    Not with `__wrapped__`, which accelerate follows, past the patch, when it takes its own wrapper off.
    """
    functools.update_wrapper(forward, original)
    del forward.__wrapped__  # type: ignore[attr-defined]
    parameters = dict(inspect.signature(original).parameters)
    if "shift_labels" not in parameters:
        extra = inspect.Parameter("shift_labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = [parameters.popitem()[1]] if list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        parameters = {parameter.name: parameter for parameter in [*parameters.values(), extra, *last]}
    forward.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return forward


def logprobs_of(
    model: CausalLM,
    options: LogitOptions,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> CausalLMLogprobs:
    """The log-probs that `forward(**inputs)`, the own forward of `model`, would have returned logits for; see
    `patch_causal_lm`. To be called inside the model's (patched) forward."""
    if shift_labels is not None:  # first, as in transformers' own loss; padding-free collators give both
        targets = shift_labels
    elif labels is not None:
        targets = next_token_targets(labels, IGNORED)
    else:
        raise ValueError("log-probs need labels or shift_labels")

    scored = score(model, options, forward, inputs, targets, temperature=temperature, outputs=outputs, backend=backend)
    scores = scored.scores
    return CausalLMLogprobs(
        loss=scored.loss(num_items_in_batch, lambda: aux_loss_coefficient(model)),
        logprobs=scores.logprobs,
        entropy=scores.entropy,
        is_top1=scores.is_top1,
        mean_logit=scores.mean_logit,
        log_sum_sq_probs=scores.log_sum_sq_probs,
        token_mask=scored.mask,
        aux_loss=scored.aux_loss,
        hidden_states=scored.output.get("hidden_states"),
    )


def nll_loss(
    outputs: CausalLMLogprobs, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Negative log-likelihood in nats of a patched model's outputs, for `Trainer(compute_loss_func=nll_loss)`.

    The sum over tokens that count, divided by `num_items_in_batch`, or by their number. Write your own like it:
    `outputs.logprobs` is differentiable, as is `outputs.entropy` where it was computed. Trainer takes `labels` away
    before it calls the model, so wrap the collator in `with_shift_labels`. Without a loss function of your own neither
    is needed. (Trainer's label smoothing, which needs all logits, takes labels away too, and so gets the model's own.)
    `outputs.loss` has a mixture of experts' load-balancing loss, this has not: `outputs.aux_loss` is there to add.
    """
    if not isinstance(outputs, CausalLMLogprobs) or outputs.logprobs is None or outputs.token_mask is None:
        raise ValueError(
            "the model returned no log-probs: patch it (patch_causal_lm) and wrap the collator in with_shift_labels"
        )
    count = outputs.token_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -outputs.logprobs.sum() / count


def with_shift_labels(collate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A data collator whose batches hold `shift_labels` as well, each position's own target, made from `labels` unless
    the collator gave them already."""

    @functools.wraps(collate)
    def collate_with_targets(*args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = collate(*args, **kwargs)
        batch.setdefault("shift_labels", next_token_targets(batch["labels"], IGNORED))
        return batch

    return collate_with_targets


def _refuse_another_loss(model: CausalLM) -> None:
    """Encoder-decoders' decoders do not shift labels, say, and some models add a term of their own."""
    labels = torch.tensor([[0, 1, IGNORED, 0]], device=model.get_input_embeddings().weight.device)
    output = forward_of_known_logits(model, labels=labels).output
    logits = output.logits.float()
    expected = ForCausalLMLoss(logits, labels, logits.shape[-1])
    if output.get("aux_loss") is not None:
        expected = expected + aux_loss_coefficient(model) * output.aux_loss
    if not torch.allclose(output.loss.float(), expected.to(output.loss.device), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the loss of {type(model).__name__} is not that of a causal language model: of known logits it makes "
            f"{output.loss:.4g}, where the next tokens' cross entropy is {expected:.4g}"
        )


def _refuse_other_models(model: CausalLM) -> None:
    name = type(model).__name__
    if replaced_forward(model) is not None:
        raise ValueError(
            f"the forward of {name} was replaced already (a patch, a device map): patch it once, and first"
        )
    if model.config.is_encoder_decoder or model.loss_function is not ForCausalLMLoss:
        raise ValueError(f"the loss of {name} is not that of a causal language model (ForCausalLMLoss of one stack)")
