"""Models and tokenizers: loading them, making room for tokens, saving them."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..config.base import AdapterConfig, OutputConfig, TrainConfig
from ..data.chat import set_chat_template
from ..data.encoding import Codec
from ..errors import UNREADABLE, UsageError
from ..training.fsdp import saved_dtype, sharding, state_within
from .checks import check_vocabulary, largest_id
from .lora import TRAINED, adapter_of, base_of, load_adapter, merged

HEADS = ("score.", "classifier.")  # of sequence classifiers, on top of a language model


def load_pretrained(
    auto: type, name: str, noun: str, *, key: str, merges: bool = False, new: tuple = (), hint: str = "", **options: Any
) -> PreTrainedModel:
    """The model `name`, dropout off; `options` are those of `loading_of` and from_pretrained. The folder of an adapter
    is its base with the adapter's layers, frozen; with `merges` these are merged into the weights.

    UsageError where it cannot be loaded as `noun`, or lacks weights other than those that begin with `new`.
    """
    check_local(name, key)
    trust_remote_code = options.get("trust_remote_code", False)
    if (base := base_of(name, key)) is not None:
        key_of_base = f"{key}: the base of the adapter {name!r}"
        if merges and "quantization_config" in options:
            raise UsageError(
                f"{key}: load_in_4bit: an adapter is not merged into four bits; `rlhf merge` {name!r} first"
            )
        model = load_pretrained(auto, base, noun, key=key_of_base, new=(*new, *HEADS), hint=hint, **options)
        make_room(model, load_tokenizer(name, key=key, trust_remote_code=trust_remote_code))
        load_adapter(model, name, key, "CAUSAL_LM" if auto is AutoModelForCausalLM else "SEQ_CLS", merges)
        if merges:
            PartialState().print(f"{name} is an adapter: it is merged into the weights of {base}")
        return turn_dropout_off(merged(model)) if merges else model
    try:
        with without_report():
            facts = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            options = {"dtype": "auto", "output_loading_info": True} | options
            model, report = auto.from_pretrained(name, **options)
    except (ImportError, RuntimeError, SafetensorError, StrictDataclassError, *UNREADABLE) as error:
        raise UsageError(f"{key}: cannot load {describe(name)} as {noun}: {error}") from error
    missing = sorted(weight for weight in report["missing_keys"] if not weight.startswith(new))
    if missing:
        some = ", ".join(missing[:5])
        raise UsageError(f"{key}: {name!r} lacks weights, which would start at random: {some}{hint}")
    model._saved_dtype = facts.dtype or facts.get_text_config().dtype or torch.float32
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):  # bitsandbytes packs weights of eval mode, and loses gradients
            part.support_avx512bf16_for_cpu = False
    return turn_dropout_off(model)


def loading_of(config: Any, *, trains: bool = False) -> dict[str, Any]:
    """How the configuration wants a model loaded. One that will be sharded becomes fp32 part by part, when it is."""
    adapts = trains and config.use_peft
    dtype = config.trained_dtype if trains else config.dtype or "auto"
    if trains and sharding() and dtype == "float32":
        dtype = "auto"
    options = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    if adapts and config.load_in_4bit:
        options["quantization_config"] = four_bits(config)
    return options | {"dtype": dtype, "merges": trains and not adapts}


def four_bits(config: AdapterConfig) -> BitsAndBytesConfig:
    """The frozen base below an adapter in four bits, multiplied in bf16 unless `dtype` names another."""
    if sharding():
        raise UsageError(
            "load_in_4bit: FSDP does not cut four-bit weights, which each process holds whole. Leave it out: LoRA "
            "under FSDP holds a part of the weights in bfloat16; or run it with --accelerate_config ddp"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype="bfloat16" if config.dtype == "auto" else config.trained_dtype,
    )  # fmt: skip


def load_causal_lm(name: str, *, key: str, **loading: Any) -> PreTrainedModel:
    model = load_pretrained(AutoModelForCausalLM, name, "a causal language model", key=key, **loading)
    if any("ForSequenceClassification" in saved for saved in model.config.architectures or []):
        raise UsageError(f"{key}: {name!r} is a reward model (a sequence classifier), not a language model")
    return model


def meta_model(
    name: str, *, key: str, trust_remote_code: bool = False, auto: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """The model without its weights, which costs nothing, to see what fits into it; `options` are its config's."""
    check_local(name, key)
    base = base_of(name, key)
    try:
        facts = AutoConfig.from_pretrained(base or name, trust_remote_code=trust_remote_code)
        if auto is not AutoModelForCausalLM:
            facts.num_labels = 1  # a reward
        with torch.device("meta"):
            model = auto.from_config(facts, trust_remote_code=trust_remote_code, **options)
            if base is not None:
                make_room(model, load_tokenizer(name, key=key, trust_remote_code=trust_remote_code))
            return model
    except (ImportError, StrictDataclassError, *UNREADABLE) as error:
        raise UsageError(f"{key}: cannot load {describe(name)} as a causal language model: {error}") from error


def load_tokenizer(name: str, *, key: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    check_local(name, key)
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = base_of(name, key) or name
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (ImportError, StrictDataclassError, *UNREADABLE) as error:
        raise UsageError(f"{key}: cannot load a tokenizer from {describe(name)}: {error}") from error


def load_codec(name: str, config: OutputConfig, *, key: str) -> Codec:
    """The tokenizer of `name`, at the run's date; it ends where generation by the model `name` does."""
    tokenizer = load_tokenizer(name, key=key, trust_remote_code=config.trust_remote_code)
    date = None if config.chat_template_date is None else datetime.fromisoformat(config.chat_template_date)
    return Codec(tokenizer, end_ids_of(name, config.trust_remote_code), date)


def load_codec_for(config: TrainConfig) -> tuple[Codec, int]:
    """The codec of the tokenizer that the configuration names, or the model's, with its chat_template_path; and the
    largest id before a template brought tokens of its own."""
    key = "model_name_or_path" if config.tokenizer_name_or_path is None else "tokenizer_name_or_path"
    codec = load_codec(getattr(config, key), config, key=key)
    largest = largest_id(codec.tokenizer)
    codec.ends |= end_ids_of(config.model_name_or_path, config.trust_remote_code)
    if config.chat_template_path is not None:
        set_chat_template(codec.tokenizer, config.chat_template_path)
        codec = Codec(codec.tokenizer, codec.ends, codec.template.now)
    return codec, largest


def end_ids_of(name: str, trust_remote_code: bool) -> set[int]:
    """The ids at which generation by the model stops, as its generation_config says, or else its config; none where
    there is no model of that name, but a tokenizer alone."""
    kinds: tuple[type[GenerationConfig] | type[AutoConfig], ...] = (GenerationConfig, AutoConfig)
    for kind in kinds:
        try:
            facts = kind.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (StrictDataclassError, *UNREADABLE):
            continue
        ids = end_ids_in(facts if kind is GenerationConfig else facts.get_text_config())
        if ids:
            return ids
    base = base_of(name, "the model's generation_config")
    return set() if base is None else end_ids_of(base, trust_remote_code)


def end_ids_in(config: GenerationConfig | PreTrainedConfig) -> set[int]:
    ids = config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds embeddings for the tokenizer's new tokens, near the mean of the others: old tokens keep their logits, and a
    new one is as likely as an average one."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with without_report():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=model.device.type != "meta")


def adapt_to(model: PreTrainedModel, codec: Codec, largest: int, *, grows: bool = True) -> None:
    """Makes a model to train fit the codec: its embeddings, beyond `largest`, and where generation stops. Below an
    adapter it may not grow: new embeddings would stay as they are drawn."""
    check_vocabulary(model, largest)  # before room is made for a template's tokens
    if not grows and len(codec.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UsageError(
            "use_peft: the chat template brings tokens that the model does not embed, and an adapter trains no "
            "embeddings. Choose another chat_template_path, or train the model with it first, without use_peft"
        )
    make_room(model, codec.tokenizer)
    stop_at(model, codec)


def stop_at(model: PreTrainedModel, codec: Codec) -> None:
    """Makes generation stop at all the codec's ends, beside those that the model stops at already."""
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            ids = sorted(codec.ends | end_ids_in(config))
            config.eos_token_id = ids[0] if len(ids) == 1 else ids or None


def check_local(name: str, key: str) -> None:
    """UsageError for a path that does not exist; a hub id, `name` or `owner/name`, passes."""
    if not os.path.exists(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > 200):
        raise UsageError(f"{key}: no such folder: {name}")


def describe(name: str) -> str:
    """A model's name, for messages; one that is no folder is called a hub id, as it may be a mistyped path."""
    return repr(name) if os.path.exists(name) else f"{name!r} (no folder here, so taken for a hub id)"


@contextmanager
def without_report() -> Iterator[None]:
    """Silences transformers' report of new weights: the caller reports them, where it matters."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def turn_dropout_off(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode: without dropout, layer drop and router noise; its config, which is saved, keeps them."""
    return model.eval()


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Makes the model recompute activations in the backward pass, still without dropout.

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


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, unties: bool = False
) -> None:
    """Writes a folder that Auto... classes load: whole weights, an adapter merged into a copy of them. `unties`: also
    the head's weight, where it is that of the embeddings."""
    if getattr(model, "is_quantized", False):
        raise UsageError("weight_sync: four-bit weights (load_in_4bit) do not travel, but their adapter does: lora")
    state = state_within(model)
    if adapter_of(model) is not None:
        if state is not None:
            raise UsageError("weight_sync: under FSDP an adapter travels as one: lora")
        model = merged(copy.deepcopy(model))
    if unties and ties_head(model):
        head = model.get_output_embeddings()
        (name,) = (f"{name}.weight" for name, part in model.named_modules() if part is head)
        state = state or model.state_dict()
        state |= {name: state[name].clone()}  # shared storage would be written once
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def ties_head(model: PreTrainedModel) -> bool:
    """Whether the head's weight is that of the embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def save_result(model: PreTrainedModel, tokenizer: Any, folder: Path, config: AdapterConfig) -> None:
    """Writes what a run has trained, and leaves the model so: an adapter, or whole weights, in the dtype in which they
    were saved before, or that the configuration names."""
    if (adapter := adapter_of(model)) is not None and not config.merge_adapter:
        adapter.model.save_pretrained(folder, selected_adapters=[TRAINED])
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    dtype = saved_dtype(model, config)
    save_model(merged(model).to(dtype), tokenizer, folder)
