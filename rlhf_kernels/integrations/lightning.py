"""DPO and supervised fine-tuning as a Lightning module's steps. Nothing is imported of it: lightning and
pytorch_lightning do alike.

    class Policy(FusedDPOMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = patch_causal_lm(AutoModelForCausalLM.from_pretrained(...))
            self.ref_model = patch_causal_lm(AutoModelForCausalLM.from_pretrained(...)).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.parameters(), lr=1e-6)
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..dpo import dpo_loss
from ..dpo.reference import LOSS_TYPES
from .lm_head import CausalLM
from .scores import IGNORED, aux_loss_coefficient
from .transformers import CausalLMLogprobs

__all__ = ["FusedDPOMixin", "FusedSFTMixin"]

Batch = Mapping[str, Any]


class _Steps(abc.ABC):
    """training_step and validation_step from one loss. Goes before LightningModule among the bases."""

    model: CausalLM
    log_dict: Callable[..., None]  # LightningModule's

    @abc.abstractmethod
    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], int]:
        """(loss with gradient, what is logged beside it, the size of the batch)."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, for automatic optimisation. Logs under `train/`, of this process."""
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The same under `val/`, the means over the epoch and all processes."""
        return self._step(batch, "val")

    def _step(self, batch: Batch, stage: str) -> Tensor:
        loss, metrics, size = self.loss_and_metrics(batch)
        metrics = {f"{stage}/{name}": value for name, value in {"loss": loss.detach(), **metrics}.items()}
        self.log_dict(metrics, batch_size=size, sync_dist=stage != "train")
        return loss


class FusedSFTMixin(_Steps):
    """Supervised fine-tuning: `training_step` and `validation_step` for a LightningModule that has

        model      a causal LM of transformers that went through `patch_causal_lm`

    A batch is what the model is called with: input_ids, attention_mask, labels [B, T], -100 where masked, as Hugging
    Face's collators make it. The loss is the mean over the batch's tokens that count, in nats. Logged: loss.
    """

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], int]:
        """(loss with gradient, what is logged beside it, the number of sequences), for steps of your own."""
        out = _logprobs_of(self.model, batch)
        assert out.loss is not None and out.logprobs is not None
        return out.loss, {}, out.logprobs.shape[0]


class FusedDPOMixin(_Steps):
    """Preference optimisation: `training_step` and `validation_step` for a LightningModule that has

        model             a causal LM of transformers that went through `patch_causal_lm`
        ref_model         another such, frozen. None (the default): the batch brings the reference's log-probs, or
                          `loss_type` takes none, or `model` has adapters of peft and is the reference without them
        beta, loss_type, label_smoothing, gamma      as in `rlhf_kernels.dpo_loss`: 0.1, "sigmoid", 0.0, 0.5

    A batch holds chosen_input_ids, chosen_attention_mask, chosen_labels [P, T], -100 where masked, and the same of
    rejected_ [P, T']; perhaps ref_chosen_logps and ref_rejected_logps [P], sums in nats, which go before any model.
    Chosen and rejected go through the model in one call. The loss is the mean over the pairs; a mixture of experts that
    returns router logits adds its load-balancing loss. Logged: loss, rewards/chosen, rewards/rejected,
    rewards/accuracies, rewards/margins, logps/chosen, logps/rejected.
    """

    ref_model: CausalLM | None  # without a value: nn.Module finds its children only where the class has none
    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 0.5

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], int]:
        """(loss with gradient, what is logged beside it, the number of pairs), for steps of your own.

        Raises ValueError: columns that are missing, a model that is not patched, a reference that is missing or not
        frozen, and as `rlhf_kernels.dpo_loss`.
        """
        inputs = _chosen_then_rejected(batch)
        policy = _logprobs_of(self.model, inputs)
        assert policy.logprobs is not None and policy.token_mask is not None
        logps = policy.logprobs.sum(-1)
        chosen_idxs, rejected_idxs = torch.arange(len(logps), device=logps.device).chunk(2)
        losses, rewards = dpo_loss(
            logps, self._reference_logps(batch, inputs), chosen_idxs, rejected_idxs, self.beta,
            loss_type=self.loss_type, label_smoothing=self.label_smoothing,
            token_counts=policy.token_mask.sum(-1), gamma=self.gamma,
        )  # fmt: skip
        loss = losses.mean()
        if policy.aux_loss is not None:
            loss = loss + aux_loss_coefficient(self.model) * policy.aux_loss
        chosen, rejected = rewards.chunk(2)
        logps_chosen, logps_rejected = logps.detach().chunk(2)
        metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": logps_chosen.mean(),
            "logps/rejected": logps_rejected.mean(),
        }
        return loss, metrics, len(chosen)

    @torch.no_grad()
    def _reference_logps(self, batch: Batch, inputs: dict[str, Tensor]) -> Tensor | None:
        """[2 P], chosen before rejected; None where the loss takes none."""
        if self.loss_type in LOSS_TYPES and LOSS_TYPES[self.loss_type].reference_free:
            return None
        if "ref_chosen_logps" in batch:
            return torch.cat([_column(batch, "ref_chosen_logps"), _column(batch, "ref_rejected_logps")])
        ref_model = getattr(self, "ref_model", None)
        as_reference: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if ref_model is not None:
            if any(parameter.requires_grad for parameter in ref_model.parameters()):
                raise ValueError("ref_model is not frozen: ref_model.requires_grad_(False)")
            ref_model.eval()  # train() of the module reaches it, and dropout has no place in a reference
            reference = ref_model
        elif hasattr(self.model, "disable_adapter"):
            reference, as_reference = self.model, _without_adapters(self.model)
        else:
            raise ValueError(
                f"loss_type={self.loss_type!r} needs a reference: set self.ref_model, give the batch ref_chosen_logps "
                "and ref_rejected_logps, or train adapters of peft"
            )
        with as_reference:
            logprobs = _logprobs_of(reference, inputs).logprobs
        assert logprobs is not None
        return logprobs.sum(-1)


@contextlib.contextmanager
def _without_adapters(model: CausalLM) -> Iterator[None]:
    """Runs the model without adapters and dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with model.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _logprobs_of(model: CausalLM, inputs: Mapping[str, Any]) -> CausalLMLogprobs:
    out = model(**inputs)
    if not isinstance(out, CausalLMLogprobs):
        raise ValueError(
            f"{type(model).__name__} returned {type(out).__name__} instead of log-probs: patch it where you make it, "
            "self.model = patch_causal_lm(model), and pass labels"
        )
    return out


def _chosen_then_rejected(batch: Batch) -> dict[str, Tensor]:
    """The model's arguments: rows of both, [2 P, max(T, T')], the shorter ones padded on the right."""
    inputs = {}
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        chosen, rejected = _column(batch, f"chosen_{name}"), _column(batch, f"rejected_{name}")
        if len(chosen) != len(rejected):
            raise ValueError(f"a batch needs as many chosen as rejected, got {len(chosen)} and {len(rejected)}")
        inputs[name] = pad_sequence([*chosen, *rejected], batch_first=True, padding_value=padding)
    return inputs


def _column(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}, only {sorted(batch)}")
    return batch[name]
