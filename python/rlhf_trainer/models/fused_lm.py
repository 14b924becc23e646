"""A causal language model that runs a loss in the place of its head."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_kernels.integrations.lm_head import LMHead, LogitOptions, logit_options_of, run_in_head
from rlhf_kernels.integrations.lm_head import lm_head_of as read_head

from ..config.base import OutputConfig, TrainConfig
from ..data.batches import Batch
from ..data.encoding import Codec
from ..errors import UsageError
from .loading import adapt_to, checkpoint_gradients, load_causal_lm, loading_of
from .lora import leave_inputs, train_adapter
from .sequence_parallel import SequenceParallel, share_sequences

Result = TypeVar("Result")


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """The LM head, with scale and soft cap; UsageError where it is not one matrix of a known form."""
    with _for_users():
        return read_head(model)


class FusedLM(nn.Module):
    """A causal LM whose forward runs a function of (hidden states, head) where the head's matmul would have been.

    See `run_in_head`: the loss belongs in `use`, inside the model's call, not behind the wrapped module. So wrap this
    module (DDP, FSDP, ZeRO), and call the wrapper.
    """

    def __init__(self, model: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16
        # A mixture of experts whose config asks for it makes a balancing loss in each call: `with_aux_loss` adds it.
        self.aux_coefficient = aux_coefficient_of(model)
        self.aux_loss: Tensor | None = None
        self.sequence: SequenceParallel | None = None
        with _for_users():
            self.logit_scale, self.logit_softcap = logit_options_of(model)
        if bf16:
            leave_inputs(model)

    def forward(self, batch: Batch, use: Callable[[Tensor, LMHead], Result]) -> Result:
        """batch of [S, T] -> use(hidden [S, T, D], head), with gradients to the whole model; hidden states are those of
        this process's positions where processes share sequences."""
        options = LogitOptions(self.logit_scale, self.logit_softcap)
        if self.sequence is not None:
            batch = part_of(batch, self.sequence)
        inputs = inputs_of(batch) | {"use_cache": False}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bf16))
            if self.aux_coefficient and batch.real is not None:  # what the balancing loss takes for the attention mask
                mask = {"attention_mask": inputs.get("attention_mask")}
                inputs["attention_mask"] = batch.real
                stack.callback(
                    self.model.base_model.register_forward_pre_hook(
                        lambda _, args, kwargs: (args, kwargs | mask), with_kwargs=True
                    ).remove
                )
            result, output = run_in_head(self.model, use, options, inputs)
        self.aux_loss = getattr(output, "aux_loss", None)
        return result


def part_of(batch: Batch, sequence: SequenceParallel) -> Batch:
    """The inputs of this process's positions; labels are the loss's to part. Padding, on the right, is nothing that
    causal attention would have to leave out."""
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)
    ids, positions = sequence.part(batch.input_ids), sequence.part(positions)
    return batch._replace(input_ids=ids, attention_mask=None, position_ids=positions)


def aux_coefficient_of(model: PreTrainedModel) -> float:
    """The weight of the balancing loss of a mixture of experts; 0 where the config does not ask for it."""
    config = model.config.get_text_config()
    return getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0


@contextmanager
def _for_users() -> Iterator[None]:
    """Turns the ValueError of a model that cannot be used into a UsageError: its user can change it."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def load_fused(config: OutputConfig, name: str, key: str) -> FusedLM:
    """The model `name`, which does not train, as the configuration wants models run."""
    return FusedLM(load_causal_lm(name, key=key, **loading_of(config)), bf16=config.bf16)


def load_policy(config: TrainConfig, codec: Codec, largest: int) -> FusedLM:
    """The model to train, fit to the codec as `adapt_to` says; with use_peft its adapter, and the rest frozen."""
    model = load_causal_lm(config.model_name_or_path, key="model_name_or_path", **loading_of(config, trains=True))
    adapt_to(model, codec, largest, grows=not config.use_peft)
    if config.use_peft:
        train_adapter(model, config, "CAUSAL_LM")
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return FusedLM(model, bf16=config.bf16)


def share_positions(fused: FusedLM, sequence: SequenceParallel | None, key: str) -> None:
    """Has the processes of the group, if there is one, each compute a part of every sequence."""
    if sequence is None:
        return
    if fused.aux_coefficient:
        raise UsageError(f"sp_size: the balancing loss of {key} is that of whole sequences; leave sp_size at 1")
    with torch.autocast(fused.model.device.type, torch.bfloat16, enabled=fused.bf16):
        share_sequences(fused.model, sequence, key)
    fused.sequence = sequence


def check_same_vocabulary(policy: FusedLM, reference: FusedLM, key: str) -> None:
    sizes = [fused.model.get_output_embeddings().weight.shape[0] for fused in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"{key}: a vocabulary of {sizes[1]} tokens, the model has {sizes[0]}")


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The arguments that a model is called with."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}
