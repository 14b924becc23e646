"""Scores of a batch's tokens by a causal LM, computed inside the call of its head: what the integrations share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..logprob import LinearLogprobs, linear_logprobs
from .lm_head import CausalLM, LMHead, LogitOptions, run_in_head

IGNORED = -100


class Scored(NamedTuple):
    """`scores` and `targets` [B, T], of each token; where the model is called for its last logits alone, of those
    positions. `output`: what the model returned, without logits."""

    scores: LinearLogprobs
    targets: Tensor
    output: Any

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, where a target counts."""
        return self.targets != IGNORED

    @property
    def aux_loss(self) -> Tensor | None:
        """The load-balancing loss of a mixture of experts, where router logits are returned."""
        return self.output.get("aux_loss")

    def loss(self, count: Tensor | int | None, aux_coefficient: Callable[[], float]) -> Tensor:
        """The loss that the model's own forward would have returned: nats per token that counts, or over `count`, and
        the load-balancing loss, if any, times its coefficient."""
        loss = -self.scores.logprobs.sum() / (self.mask.sum().clamp(min=1) if count is None else count)
        return loss if self.aux_loss is None else loss + aux_coefficient() * self.aux_loss.to(loss.device)


def score(
    model: CausalLM,
    options: LogitOptions,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    fp32: bool = False,
) -> Scored:
    """Scores of targets [B, T], each of its own position, by `forward(**inputs)`, the own forward of `model`. To be
    called inside the model's (patched) forward.

    fp32: hidden states and weights are used in fp32, whatever autocast says.

    Raises ValueError where there are other hidden states than targets.
    """

    def use(hidden: Tensor, head: LMHead) -> tuple[LinearLogprobs, Tensor]:
        here = targets.to(hidden.device)
        keep = inputs.get("logits_to_keep")
        if isinstance(keep, Tensor) or here.shape != hidden.shape[:-1]:
            here = _kept(here, keep)
        if here.shape != hidden.shape[:-1]:
            raise ValueError(
                f"expected a label for each hidden state, got labels {tuple(targets.shape)} and hidden states "
                f"{tuple(hidden.shape[:-1])}: does something put tokens before or between those of input_ids?"
            )
        with contextlib.ExitStack() as stack:
            if fp32:
                stack.enter_context(torch.autocast(hidden.device.type, enabled=False))
                hidden = hidden.float()
            scores = linear_logprobs(
                hidden, head.weight, here, temperature=temperature, outputs=outputs, backend=backend, **head.options()
            )
        # No views: what a caller changes in place would lose the hook by which FSDP2 gathers weights before backward.
        return LinearLogprobs._make(None if r is None else r.clone() for r in scores), here

    arguments = {**inputs, "use_cache": False, "return_dict": True}
    (scores, here), output = run_in_head(model, use, options, arguments, forward)
    return Scored(scores, here, output)


def refuse_prompt_learning(model: CausalLM) -> None:
    """Raises ValueError where an adapter of peft puts virtual tokens before the labels."""
    configs = getattr(model, "peft_config", {})
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"adapter {name!r} is {type(config).__name__}: prompt learning puts virtual tokens before the labels; "
                "LoRA, DoRA and full fine-tuning are supported"
            )


def _kept(targets: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    """[B, T] -> those of the positions whose hidden states reach the head, as transformers chooses them: the last ones,
    those of indices [K] or [B, K], or where a mask [B, T] says so, one after another."""
    if logits_to_keep is None or isinstance(logits_to_keep, int):
        return targets[:, -(logits_to_keep or 0) :]
    kept = logits_to_keep.to(targets.device)
    if kept.dim() == 2:
        return targets[kept] if kept.dtype == torch.bool else targets.gather(1, kept)
    return targets[:, kept]


def aux_loss_coefficient(model: CausalLM) -> float:
    """The factor of a mixture of experts' load-balancing loss."""
    config = model.config.get_text_config()
    for owner, name in ((model, "router_aux_loss_coef"), (model, "aux_loss_coef"), (config, "router_aux_loss_coef")):
        if hasattr(owner, name):
            return getattr(owner, name)
    raise ValueError(f"{type(model).__name__} returns an aux_loss and has no router_aux_loss_coef to weigh it by")
