"""Trainers of TRL whose log-probs come from rlhf_kernels.

from rlhf_kernels.integrations.trl import fused
trainer = fused(DPOTrainer)(model=model, args=args, train_dataset=data, processing_class=tokenizer)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import trl
from torch import Tensor, nn

from .lm_head import SLOT, CausalLM
from .scores import refuse_prompt_learning

__all__ = ["fused"]

Trainer = TypeVar("Trainer")

# 1.14 scores through other functions than the versions around it.
VERSIONS = {"1.13": "trl_1_13", "1.15": "trl_1_16", "1.16": "trl_1_16"}


@functools.cache
def fused(trainer: type[Trainer]) -> type[Trainer]:
    """A subclass of a trainer of TRL that takes log-probs, entropies and what it logs of the logits from rlhf_kernels.

    Everything else, the constructor's arguments, data, generation, losses and metrics, is the trainer's own. What its
    constructor computes is fused too, precomputed reference log-probs say. The class itself stays as it was.

    Args:
        trainer: DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer (TRL 1.13, 1.15, 1.16), KTOTrainer (1.15, 1.16), or a
            subclass of one that leaves to it how log-probs are computed.

    Raises:
        ImportError: another version of TRL, or functions of TRL that are not what they were in that version.
        TypeError: another class.
        ValueError, by the new class's constructor: what would take the logits of all tokens (a `compute_loss_func`,
            label smoothing of SFT), prompt learning, a loss of Liger, nn.DataParallel, a head that cannot be read.
    """
    host = _module_for(trl.__version__)
    for base in trainer.__mro__:
        if base.__name__ in host.TRAINERS and base.__module__.startswith("trl.trainer."):
            return host.fuse(trainer, base)
    raise TypeError(
        f"fused() takes {', '.join(host.TRAINERS)} of TRL {trl.__version__} or a subclass of one, got {trainer!r}"
    )


def _module_for(version: str) -> types.ModuleType:
    release = ".".join(version.split(".")[:2])
    if release not in VERSIONS:
        raise ImportError(
            f"TRL {version} is not known here: known are {', '.join(VERSIONS)}. Install one of them "
            "(pip install 'trl==1.16.*'), or use TRL's trainer as it is"
        )
    return importlib.import_module(f"{__package__}.{VERSIONS[release]}")


def module_of(cls: type) -> types.ModuleType:
    return sys.modules[cls.__module__]


@contextlib.contextmanager
def replaced(module: types.ModuleType, **others: Any) -> Iterator[None]:
    """Global names of a module are others for a while; other threads see them too."""
    own = {name: getattr(module, name) for name in others}
    vars(module).update(others)
    try:
        yield
    finally:
        vars(module).update(own)


def refuse_model(trainer: Any) -> None:
    """Raises ValueError where the trainer's model cannot be scored."""
    refuse_prompt_learning(trainer.model)
    if trainer.args.n_gpu > 1:
        raise ValueError("nn.DataParallel is not supported: launch one process per GPU (torchrun, accelerate launch)")


def refuse_loss_of_logits(trainer: Any, *own: Callable[..., Any]) -> None:
    """Raises ValueError where an SFTTrainer's loss is computed from logits of all tokens, but by a function of its
    `own`."""
    wanting = ["label_smoothing_factor"] if trainer.args.label_smoothing_factor > 0 else []
    if trainer.compute_loss_func is not None and trainer.compute_loss_func not in own:
        wanting.append("compute_loss_func")
    if wanting:
        raise ValueError(
            f"{' and '.join(wanting)}: this loss is computed from the logits of all tokens, which are not made here. "
            "Leave it away, or use TRL's trainer as it is"
        )


def aux_loss_coefficient(model: CausalLM) -> float:
    """The factor of a mixture of experts' load-balancing loss: that of TRL's arguments, which it writes into the
    config."""
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)


def forward_of(model: CausalLM) -> Callable[..., Any]:
    """The model's forward as a function of the model too, so that a copy of the model runs its own."""
    forward = model.forward
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        return forward.__func__
    return lambda _self, *args, **kwargs: forward(*args, **kwargs)


def with_head_as_it_was(model: CausalLM) -> None:
    """TRL's `cast_lm_head_to_fp32` puts a function in place of the head's forward. A hook does the same cast and leaves
    the head to be read."""
    head = model.get_output_embeddings()
    if getattr(vars(head).get("forward"), "__name__", "") == "cast_forward_to_fp32":
        del head.forward
        vars(head).pop(SLOT, None)  # a forward that was there before is gone
        head.register_forward_pre_hook(_to_fp32)


def _to_fp32(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].float(),)
