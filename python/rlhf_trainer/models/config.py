"""The configuration of `rlhf merge`."""

from dataclasses import dataclass

from ..config.base import MODEL, OutputConfig


@dataclass(kw_only=True)
class MergeConfig(OutputConfig):
    """Options of `rlhf merge`. The weights are in the dtype of the base, unless `dtype` names another."""

    model_name_or_path: str = MODEL.required("The folder of an adapter (LoRA).", names_input=True)
