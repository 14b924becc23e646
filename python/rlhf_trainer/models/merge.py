"""`rlhf merge`: the whole weights of an adapter and its base, for what loads no adapters."""

import json
from pathlib import Path

from ..errors import UsageError
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import MergeConfig
from .loading import load_causal_lm, load_codec, loading_of, save_model, stop_at
from .lora import CONFIG, base_of
from .scoring import load_reward_model


def merge(config: MergeConfig) -> Path:
    """Writes the model and its tokenizer into output_dir, which it returns."""
    single_process("rlhf merge")
    if not begin(config):
        return Path(config.output_dir)
    key, name = "model_name_or_path", config.model_name_or_path
    if base_of(name, key) is None:
        raise UsageError(f"{key}: expected the folder of an adapter, with {CONFIG} in it, got {name!r}")
    codec = load_codec(name, config, key=key)
    facts = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
    load = load_reward_model if facts.get("task_type") == "SEQ_CLS" else load_causal_lm
    model = load(name, key=key, **loading_of(config) | {"merges": True})
    stop_at(model, codec)
    work = open_output(config)
    save_model(model.to(model.dtype), codec.tokenizer, work)  # a layer that was trained whole is in fp32
    folder = commit_output(config)
    print(f"saved to {folder}")
    return folder
