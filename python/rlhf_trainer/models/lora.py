"""LoRA by peft: an adapter on a frozen model, which without it is its own reference.

The layers of an adapter stand inside the model, which stays the transformers model that it was: to all other code it is
one like any other. What peft keeps of it is an `Adapter`, beside the model's own parts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..config.base import AdapterConfig
from ..data.batches import Batch
from ..errors import UsageError

CONFIG = "adapter_config.json"
TRAINED, REFERENCE = "default", "reference"  # peft's names of the adapter, and of what it was before training
PATTERN = set("*+?|()[]^$\\")  # of these, a name of layers has none
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]


class Adapter:
    """peft's view of a model with an adapter; `is_new`: it was zero when training began."""

    def __init__(self, model: Any, is_new: bool) -> None:
        self.model, self.is_new = model, is_new


def adapter_of(model: nn.Module) -> Adapter | None:
    return getattr(model, "_rlhf_adapter", None)


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"adapters (LoRA) take the package peft, which cannot be imported ({error}): pip install peft"
        ) from error
    return peft


def base_of(name: str, key: str) -> str | None:
    """The model of which the folder `name` holds an adapter; None where it holds none."""
    path = Path(name) / CONFIG
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    base = facts.get("base_model_name_or_path")
    if facts.get("peft_type") != "LORA" or not base:
        raise UsageError(
            f"{key}: expected LoRA with a base_model_name_or_path in {path}, got {facts.get('peft_type')} of {base!r}"
        )
    return base


def put_adapter(model: PreTrainedModel, config: Any, is_new: bool) -> Any:
    """Puts the layers of a peft configuration into the model, frozen; ValueError where it has no such layers."""
    adapted = import_peft().get_peft_model(model, config, adapter_name=TRAINED)
    model._rlhf_adapter = Adapter(adapted, is_new)
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if f".{TRAINED}" in name and weight.dtype in (torch.float16, torch.bfloat16):
            weight.data = weight.data.float()  # an update does not survive rounding to bf16
    for layer in model.modules():
        for dropout in getattr(layer, "lora_dropout", {}).values():
            dropout.drops_in_updates = True  # the training loop turns it on
    return adapted


def load_adapter(model: PreTrainedModel, folder: str, key: str, task_type: TaskType, merges: bool) -> None:
    """Puts the adapter of `folder` on its base, frozen. One of another task is only of use if it will be merged."""
    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if config.task_type != task_type:
            if not merges:
                raise UsageError(
                    f"{key}: {folder!r} is an adapter with task_type {config.task_type}, expected {task_type}. "
                    "`rlhf merge` makes a model of it, from which another can start"
                )
            config.task_type = None
        adapted = put_adapter(model, config, is_new=False)
        result = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(folder, device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UsageError(f"{key}: the adapter {folder!r} does not fit {model.name_or_path!r}: {error}") from error
    missing = [name for name in result.missing_keys if f".{TRAINED}" in name]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"{key}: the adapter {folder!r} is of another model than {model.name_or_path!r}: it lacks "
            f"{len(missing)} of its weights and has {len(result.unexpected_keys)} others, such as "
            f"{(missing + result.unexpected_keys)[0]}"
        )
    if task_type == "SEQ_CLS" and config.task_type == task_type:
        model.config.architectures = [type(model).__name__]  # its head has been trained


def train_adapter(model: PreTrainedModel, config: AdapterConfig, task_type: TaskType) -> None:
    """Freezes the model but for an adapter: the one that it was loaded with, or a new one."""
    adapter = adapter_of(model)
    if adapter is not None:
        own = adapter.model.peft_config[TRAINED]
        PartialState().print(
            f"use_peft goes on with the adapter that {config.model_name_or_path} holds: r {own.r}, alpha "
            f"{own.lora_alpha}, dropout {own.lora_dropout}"
        )
    else:
        base = Path(model.name_or_path)
        targets: Any = config.lora_target_modules or None
        if targets and len(targets) == 1 and (targets[0] == "all-linear" or PATTERN & set(targets[0])):
            targets = targets[0]
        settings = import_peft().LoraConfig(
            task_type=task_type, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=targets, modules_to_save=list(config.lora_modules_to_save) or None,
            use_rslora=config.use_rslora, use_dora=config.use_dora,
        )  # fmt: skip
        try:
            put_adapter(model, settings, is_new=True)
        except ValueError as error:
            raise UsageError(f"lora_target_modules: {error}. all-linear takes all linear layers") from error
        if base.exists():  # the adapter may be loaded from another place
            settings.base_model_name_or_path = str(base.resolve())
    adapter_of(model).model.set_adapter(TRAINED)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    absent = [n for n in config.lora_modules_to_save if not any(f"{n}.modules_to_save" in name for name in trained)]
    if absent:
        raise UsageError(f"lora_modules_to_save: the model, or its adapter, has no {', '.join(absent)} to train")


def in_use(module: nn.Module) -> nn.Module:
    """The module, or of one in modules_to_save the copy that is trained."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None or TRAINED not in copies else copies[TRAINED]


class Reference:
    """A policy as it was before its adapter learned, to be called as the policy is: the same weights, without the
    adapter, or with a copy of what an adapter was that is trained on."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.adapter = policy, adapter_of(policy.model)
        if not self.adapter.is_new and REFERENCE not in self.adapter.model.peft_config:
            adapted = self.adapter.model
            adapted.add_adapter(REFERENCE, copy.deepcopy(adapted.peft_config[TRAINED]))
            weights = dict(policy.model.named_parameters())
            for name, weight in weights.items():
                if f".{TRAINED}" in name:
                    weights[name.replace(f".{TRAINED}", f".{REFERENCE}")].data = weight.detach().clone()
            policy.model.eval()
            adapted.set_adapter(TRAINED)

    def __call__(self, batch: Batch, use: Callable[..., Any]) -> Any:
        with self.before_training():
            return self.policy(batch, use)

    @contextmanager
    def before_training(self) -> Iterator[None]:
        adapted = self.adapter.model
        if not self.adapter.is_new:
            adapted.set_adapter(REFERENCE, inference_mode=True)
        else:
            adapted.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if self.adapter.is_new:
                adapted.base_model.enable_adapter_layers()
            adapted.set_adapter(TRAINED)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter merged into the weights, in place; one without an adapter as it is."""
    adapter = adapter_of(model)
    if adapter is None:
        return model
    try:
        whole = adapter.model.merge_and_unload(safe_merge=True, adapter_names=[TRAINED])
    except ValueError as error:
        raise UsageError(f"the adapter cannot be merged: {error}") from error
    del model._rlhf_adapter
    return whole.requires_grad_(True)
