"""OpenRLHF's Actor with log-probs and entropies from rlhf_kernels.

import openrlhf.models
from rlhf_kernels.integrations.openrlhf import fused
openrlhf.models.Actor = fused(openrlhf.models.Actor)  # before its trainers are imported, in each process
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from .lm_head import LogitOptions
from .scores import IGNORED
from .transformers import patch_causal_lm
from .versions import check_parameters, check_version

__all__ = ["fused"]

Actor = TypeVar("Actor")

VERSIONS = ("0.11.2",)
MODULE = "openrlhf.models.actor"


class _Rows(NamedTuple):
    """The model's arguments, and the function by which its results of each token become [B, T] again."""

    inputs: dict[str, Tensor | None]
    padded: Callable[[Tensor], Tensor]


def fused(actor: type[Actor], *, logit_options: LogitOptions | None = None) -> type[Actor]:
    """A subclass of OpenRLHF's Actor whose forward returns the same and makes no `[tokens, vocab]` logits.

    It takes and returns what Actor's does, with temperature, entropy, packed samples and ring attention, through
    DeepSpeed's engine if `model` was wrapped in one. Two things differ: log-probs are exactly 0, not numbers of no
    meaning, where a token or the one before it is padding (with `action_mask` and without `return_entropy` wherever it
    is not in the mask, and there no matmul is spent), and the output that `return_output` adds has no logits. A call
    that asks for neither `action_mask` nor `return_logprobs` wants the logits, and is Actor's own.

    Args:
        actor: openrlhf.models.Actor, or a subclass that leaves forward to it.
        logit_options: scale and soft cap of the model's logits; None asks the model when it is made, by a forward of
            two tokens. Must not be None with ZeRO-3, whose weights are not whole then: LogitOptions() for most models.

    Raises:
        ImportError: another version of OpenRLHF, or functions that do not take what they took in that version.
        TypeError: another class.
        ValueError, by the constructor: ZeRO-3 without logit_options, a vision-language model, a model that is no path,
            and as `patch_causal_lm`; by forward: return_entropy without return_output.
    """
    check_version("openrlhf", VERSIONS)
    base = next((cls for cls in actor.__mro__ if (cls.__module__, cls.__name__) == (MODULE, "Actor")), None)
    if base is None:
        raise TypeError(f"fused() takes {MODULE}.Actor or a subclass of it, got {actor!r}")
    host = sys.modules[MODULE]
    check_parameters(
        actor.forward,  # type: ignore[attr-defined]
        "self, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs, "
        "ring_attn_group, packed_seq_lens, return_entropy, mm_inputs",
    )
    check_parameters(host.unpad_and_slice_tensor, "sequences, attention_mask, ring_attn_group")
    check_parameters(host.gather_and_pad_tensor, "tensor, ring_attn_group, ring_attn_pad_len, indices, batch, seqlen")

    class Fused(actor):  # type: ignore[misc, valid-type]
        @functools.wraps(actor.__init__)  # type: ignore[misc]
        def __init__(self, pretrain_or_model: str, *args: Any, **kwargs: Any) -> None:
            if not isinstance(pretrain_or_model, str):
                raise ValueError(f"expected the path of a model, got a {type(pretrain_or_model).__name__}")
            super().__init__(pretrain_or_model, *args, **kwargs)
            _patch(self, logit_options)

        @functools.wraps(actor.forward)  # type: ignore[attr-defined]
        def forward(
            self,
            sequences: Tensor,
            action_mask: Tensor | None = None,
            attention_mask: Tensor | None = None,
            return_output: bool = False,
            allgather_logits: bool = False,
            return_logprobs: bool = False,
            ring_attn_group: dist.ProcessGroup | None = None,
            packed_seq_lens: list[int] | None = None,
            return_entropy: bool = False,
            **mm_inputs: Any,
        ) -> Any:
            if action_mask is None and not return_logprobs:
                return super().forward(
                    sequences, None, attention_mask, return_output, allgather_logits, False, ring_attn_group,
                    packed_seq_lens, return_entropy, **mm_inputs,
                )  # fmt: skip
            if return_entropy and not return_output:
                raise ValueError("return_entropy needs return_output: entropies are a part of the output")
            if attention_mask is None or mm_inputs:
                raise ValueError(f"expected an attention_mask and no other inputs, got {sorted(mm_inputs)}")
            wanted = attention_mask.bool().clone()
            wanted[:, 0] = False
            if action_mask is not None and not return_entropy:
                wanted[:, : -action_mask.shape[1]] = False
                wanted[:, -action_mask.shape[1] :] &= action_mask.bool()
            make = _packed if self.packing_samples else _padded
            rows = make(host, sequences, attention_mask, wanted, ring_attn_group)
            output = self.model(
                **rows.inputs, temperature=self.temperature, outputs=("entropy",) if return_entropy else ()
            )
            log_probs = rows.padded(output.logprobs)[:, :-1]
            if action_mask is not None:
                log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
            if return_entropy:
                output.entropy = rows.padded(output.entropy)[:, :-1]
            return (log_probs, output) if return_output else log_probs

    Fused.__name__ = Fused.__qualname__ = f"Fused{actor.__name__}"
    return Fused


def _patch(actor: Any, logit_options: LogitOptions | None) -> None:
    """patch_causal_lm of an actor's model, which is on the CPU now."""
    if actor.is_vlm:
        raise ValueError("vision-language models are not supported here: use Actor itself for them")
    head = actor.model.get_output_embeddings()
    if logit_options is None and any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        raise ValueError(
            "the model's weights are partitioned by ZeRO-3 already, so its logits cannot be looked at: say what it "
            "does to them, fused(Actor, logit_options=LogitOptions()) if nothing"
        )
    patch_causal_lm(actor.model, logit_options=logit_options)


def _padded(host: Any, sequences: Tensor, attention_mask: Tensor, wanted: Tensor, ring: Any) -> _Rows:
    """Rows as they are. `wanted` [B, T]: the tokens whose log-probs are."""
    targets = sequences.masked_fill(~wanted, IGNORED).roll(-1, 1).masked_fill(attention_mask == 0, IGNORED)
    positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    inputs = {"input_ids": sequences, "attention_mask": attention_mask, "position_ids": positions}
    return _Rows({**inputs, "shift_labels": targets}, lambda tokens: tokens)


def _packed(
    host: Any, sequences: Tensor, attention_mask: Tensor, wanted: Tensor, ring: dist.ProcessGroup | None
) -> _Rows:
    """One row of all tokens, cut for this rank of a ring: by OpenRLHF's functions, and `wanted` as they cut targets."""
    batch, length = sequences.shape
    ids, positions, targets, padding, indices = host.unpad_and_slice_tensor(sequences, attention_mask, ring)
    counted = host.unpad_and_slice_tensor(wanted.long(), attention_mask, ring)[2]
    targets = targets.masked_fill(counted == 0, IGNORED)
    return _Rows(
        {"input_ids": ids, "attention_mask": None, "position_ids": positions, "shift_labels": targets},
        lambda tokens: host.gather_and_pad_tensor(tokens, ring, padding, indices, batch, length),
    )
