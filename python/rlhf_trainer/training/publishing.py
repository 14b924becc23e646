"""What a result is, for others: a model card in its folder, and its place on the Hugging Face hub."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from jinja2 import Template

from ..config.base import TrainConfig
from ..config.parse import dump_yaml
from ..errors import UsageError

CARD = Path(__file__).with_name("model_card.md.jinja")
PACKAGES = ("rlhf_kernels", "torch", "transformers", "peft")
REFUSED = (OSError, ValueError)  # a server's refusal is an OSError


def write_card(config: TrainConfig, folder: Path) -> None:
    """README.md: what was trained of what by which command, its last metrics, versions, the configuration."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = {}
    for line in lines:
        last |= json.loads(line)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if installed(name)]
    text = Template(CARD.read_text(encoding="utf-8"), trim_blocks=True).render(
        config=config, command=type(config).__name__.removesuffix("Config"), metrics=last, versions=versions,
        yaml=dump_yaml(config), is_adapter=(folder / "adapter_config.json").is_file(),
    )  # fmt: skip
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_hub(config: TrainConfig) -> None:
    """UsageError where the hub knows no token, before anything is trained."""
    if config.push_to_hub:
        try:
            HfApi().whoami()
        except REFUSED as error:
            raise UsageError(f"push_to_hub: log in first (`hf auth login`, or HF_TOKEN): {error}") from error


def push(config: TrainConfig, folder: Path) -> str:
    """Uploads the result, without checkpoints; returns a line for the user."""
    name = config.hub_model_id or folder.name
    try:
        place = HfApi().create_repo(name, private=config.hub_private_repo, exist_ok=True)
        HfApi().upload_folder(repo_id=place.repo_id, folder_path=folder, ignore_patterns=["checkpoints/*"])
    except REFUSED as error:
        message = f"{folder} is saved, but was not pushed as {name}: {error}. Later: `hf upload {name} {folder}`"
        raise UsageError(message) from error
    return f"pushed to {place}"
