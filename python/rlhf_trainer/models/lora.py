"""LoRA by peft: an adapter on a frozen model, which without it is its own reference. Its layers stand inside the model,
which stays the transformers model that it was, to all other code one like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..config.base import AdapterConfig
from ..data.batches import Batch
from ..errors import UNREADABLE, UsageError

CONFIG = "adapter_config.json"
TRAINED, REFERENCE = "default", "reference"  # peft's names of the adapter, and of what it was before training


class Adapter(NamedTuple):
    """A model with an adapter as peft sees it; `folder`: that it was loaded from, None of a new one, which is zero."""

    model: Any
    folder: str | None


def adapter_of(model: nn.Module) -> Adapter | None:
    return getattr(model, "_rlhf_adapter", None)


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"adapters (LoRA) take the package peft: pip install peft ({error})") from error
    return peft


def base_of(name: str, key: str) -> str | None:
    """The model of which the folder `name` holds an adapter; None where it holds none."""
    path = Path(name) / CONFIG
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kind, base = facts.get("peft_type"), facts.get("base_model_name_or_path")
    except UNREADABLE as error:
        raise UsageError(f"{key}: expected the facts of an adapter in {path}: {error}") from error
    if kind != "LORA" or not base or not isinstance(base, str):
        raise UsageError(f"{key}: expected LoRA with a base_model_name_or_path in {path}, got {kind} of {base!r}")
    return base


def put_adapter(model: PreTrainedModel, config: Any, folder: str | None = None) -> Any:
    """Puts the layers of a peft configuration into the model, frozen; ValueError where it has no such layers."""
    adapted = import_peft().get_peft_model(model, config, adapter_name=TRAINED)
    model._rlhf_adapter = Adapter(adapted, folder)
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if f".{TRAINED}" in name and weight.dtype in (torch.float16, torch.bfloat16):
            weight.data = weight.data.float()  # an update does not survive rounding to bf16
    for layer in model.modules():
        for dropout in getattr(layer, "lora_dropout", {}).values():
            dropout.drops_in_updates = True  # the training loop turns it on
    return adapted


def load_adapter(model: PreTrainedModel, folder: str, key: str, task_type: str, merges: bool) -> None:
    """Puts the adapter of `folder` on its base, frozen. One of another task is only of use if it will be merged."""
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(folder)
    if config.task_type == "SEQ_CLS" == task_type:
        model.config.architectures = [type(model).__name__]  # its head has been trained
    elif config.task_type != task_type and not merges:
        raise UsageError(
            f"{key}: {folder!r} is an adapter with task_type {config.task_type}, expected {task_type}. `rlhf merge` "
            "makes a model of it, from which another can start"
        )
    elif config.task_type != task_type:
        config.task_type = None
    try:
        adapted = put_adapter(model, config, folder)
        result = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(folder, device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UsageError(f"{key}: the adapter {folder!r} does not fit {model.name_or_path!r}: {error}") from error
    missing = [name for name in result.missing_keys if f".{TRAINED}" in name]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"{key}: the adapter {folder!r} is of another model than {model.name_or_path!r}: it lacks {len(missing)} "
            f"weights and has {len(result.unexpected_keys)} others: {(missing + result.unexpected_keys)[0]}, ..."
        )


def train_adapter(model: PreTrainedModel, config: AdapterConfig, task_type: str) -> None:
    """Freezes the model but for an adapter: the one that it was loaded with, or a new one."""
    if (adapter := adapter_of(model)) is not None:
        own = adapter.model.peft_config[TRAINED]
        PartialState().print(f"goes on with the adapter {adapter.folder}: r {own.r}, alpha {own.lora_alpha}")
    else:
        targets: Any = config.lora_target_modules or None
        if targets and len(targets) == 1 and not targets[0].replace(".", "_").isidentifier():
            targets = targets[0]  # no name: all-linear, or a regular expression
        settings = import_peft().LoraConfig(
            task_type=task_type, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=targets, modules_to_save=list(config.lora_modules_to_save) or None,
            use_rslora=config.use_rslora, use_dora=config.use_dora,
        )  # fmt: skip
        try:
            put_adapter(model, settings)
        except ValueError as error:
            raise UsageError(f"lora_target_modules: {error}. all-linear takes all linear layers") from error
        if Path(model.name_or_path).exists():  # the adapter may be loaded from another place
            settings.base_model_name_or_path = str(Path(model.name_or_path).resolve())
    adapter_of(model).model.set_adapter(TRAINED)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    absent = [n for n in config.lora_modules_to_save if not any(f"{n}.modules_to_save" in name for name in trained)]
    if absent:
        raise UsageError(f"lora_modules_to_save: the model, or its adapter, has no {', '.join(absent)} to train")


def leave_inputs(model: nn.Module) -> None:
    """Under autocast, adapters need not cast their inputs to fp32, which it would take back for each product. DoRA's
    norms do without autocast."""
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = any(layer.use_dora.values())


class Reference:
    """A policy as it was before its adapter learned, to be called as the policy is: the same weights, without the
    adapter or, where training goes on with one, with a second one: what it was."""

    def __init__(self, policy: Any) -> None:
        self.policy, (self.adapted, self.folder) = policy, adapter_of(policy.model)
        if self.folder is not None:
            self.adapted.load_adapter(self.folder, REFERENCE)
            policy.model.eval()

    def __call__(self, batch: Batch, use: Callable[..., Any]) -> Any:
        if self.folder is None:
            self.adapted.base_model.disable_adapter_layers()
        else:
            self.adapted.set_adapter(REFERENCE, inference_mode=True)
        try:
            return self.policy(batch, use)
        finally:
            self.adapted.base_model.enable_adapter_layers()
            self.adapted.set_adapter(TRAINED)


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
