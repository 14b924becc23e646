"""Causal language models: loading, reading the LM head, and running a loss in the head's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config.base import TrainConfig
from ..errors import UsageError


def load_pretrained(
    auto: type,
    name: str,
    what: str,
    *,
    key: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    new: tuple[str, ...] = (),
    hint: str = "",
    **options: Any,
) -> PreTrainedModel:
    """`what`, with fp32 weights and dropout off; UsageError where weights are missing but those that begin with `new`.
    Updates at a learning rate of 1e-6 vanish in bf16 weights."""
    check_local(name, key)
    try:
        with without_report():
            model, report = auto.from_pretrained(
                name, dtype=torch.float32, attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code, output_loading_info=True, **options,
            )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{key}: cannot load {describe(name)} as {what}: {error}") from error
    missing = sorted(weight for weight in report["missing_keys"] if not weight.startswith(new))
    if missing:
        some = ", ".join(missing[:5])
        raise UsageError(f"{key}: {name!r} lacks weights, which would start at random: {some}{hint}")
    return turn_dropout_off(model)


def load_causal_lm(
    name: str, *, key: str, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    model = load_pretrained(
        AutoModelForCausalLM, name, "a causal language model", key=key, attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if any("ForSequenceClassification" in saved for saved in model.config.architectures or []):
        raise UsageError(f"{key}: {name!r} is a reward model (a sequence classifier), not a language model")
    return model


def meta_model(name: str, *, key: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights, which costs nothing, to see what fits into it."""
    check_local(name, key)
    try:
        facts = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(facts, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{key}: cannot load {describe(name)} as a causal language model: {error}") from error


def load_tokenizer(name: str, *, key: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    check_local(name, key)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"{key}: cannot load a tokenizer from {describe(name)}: {error}") from error


def load_tokenizer_for(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The one that is asked for, or the model's."""
    key = "model_name_or_path" if config.tokenizer_name_or_path is None else "tokenizer_name_or_path"
    return load_tokenizer(getattr(config, key), key=key, trust_remote_code=config.trust_remote_code)


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings for tokens that were added to the tokenizer, near the mean of those that are there: logits of the old
    tokens stay what they were, and a new one is as likely as an average one."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with without_report():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=True)


def end_where_tokenizer_does(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """So that generation stops at the end of a turn also where the chat template brought another one."""
    for config in (model.config.get_text_config(), model.generation_config):
        if config is not None:
            config.eos_token_id = tokenizer.eos_token_id


def check_local(name: str, key: str) -> None:
    """A hub id is `name` or `owner/name`; a path that is neither that nor there would only be looked for in vain."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"{key}: no such folder: {name}")


def describe(name: str) -> str:
    """A name for messages, with what it was taken for if it may be a mistake."""
    return repr(name) if Path(name).exists() else f"{name!r} (no folder here, so taken for a hub id)"


@contextmanager
def without_report() -> Iterator[None]:
    """Inside, transformers does not tell which weights are new: the caller does, where it matters."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def turn_dropout_off(model: PreTrainedModel) -> PreTrainedModel:
    """eval() turns off dropout, layer drop and router noise alike, and leaves the config, which is saved, as it was."""
    return model.eval()


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, still without dropout.

    transformers checkpoints a block only when it is in train mode. So the blocks themselves are, but not the modules
    in them, and the drop rates that a block keeps as plain numbers become 0.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(f"gradient_checkpointing: {type(model).__name__} does not support it")
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers renames it by version 6
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. fp32: small updates do not survive bf16."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
