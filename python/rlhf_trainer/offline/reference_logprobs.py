"""Reference log-probs: computed once before training, kept on disk under a key made of all they depend on."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

import rlhf_kernels as rk

from ..data.examples import Group
from ..models.fused_lm import FusedLM, LMHead
from ..models.sequence_parallel import SequenceParallel, over_group
from ..training.batch_plan import MicroBatch, share_of_process
from ..training.files import checksum, write_whole
from .pair_batches import PairBatch

LAYOUT = 2  # of this file's cache; raise it when what is stored changes its meaning


def reference_logprobs(
    reference: Callable[..., Any],
    groups: list[Group],
    plan: list[list[MicroBatch]],
    batch_of: Callable[[MicroBatch], PairBatch],
    accelerator: Accelerator,
    cache_dir: Path,
    key: str,
    sequence: SequenceParallel | None = None,
) -> list[Tensor]:
    """log pi_ref of each group's responses, [K] fp32 in nats each, from the cache or by one pass over the plan.

    `reference` is a FusedLM, wrapped or not, or a `Reference`; `sequence`: as of it.
    """
    path = cache_dir / f"{key}.safetensors"
    sizes = [len(group.responses) for group in groups]
    # One process looks into the cache, and all follow it: a file may appear between two looks.
    cached = _load(path, sum(sizes)) if accelerator.is_main_process else None
    is_cached = accelerator.reduce(torch.tensor(float(cached is not None), device=accelerator.device), "sum").item() > 0
    totals = torch.zeros(sum(sizes), device=accelerator.device)
    if is_cached:
        if cached is not None:
            totals = cached.to(accelerator.device)
        return list(accelerator.reduce(totals, "sum").split(sizes))

    parts = totals.split(sizes)  # views
    together = 1 if sequence is None else sequence.size
    rank, world = accelerator.process_index // together, accelerator.num_processes // together
    shares = [share for batch in plan for share in share_of_process(batch, rank, world)]
    disable = None if accelerator.is_main_process else True  # None: where there is no terminal
    for share in tqdm(shares, desc="reference", unit="batch", leave=False, disable=disable):
        logps = sequence_logprobs(reference, batch_of(share.indices), sequence)
        # A repeated micro-batch, and one that several processes have, must not count twice in the sum below.
        if share.weight > 0 and (sequence is None or sequence.rank == 0):
            for i, part in zip(share.indices, logps.split([sizes[i] for i in share.indices]), strict=True):
                parts[i].copy_(part)
    totals = accelerator.reduce(totals, "sum")
    if accelerator.is_main_process:
        try:
            _save(path, totals.cpu())
        except OSError as error:
            warnings.warn(f"reference log-probs are not kept for the next run: {error}", stacklevel=2)
    return list(totals.split(sizes))


@torch.no_grad()
def sequence_logprobs(model: Callable[..., Any], pairs: PairBatch, sequence: SequenceParallel | None = None) -> Tensor:
    """log pi(response | prompt) of each response, [S] in nats; `model` is a FusedLM, wrapped or not."""

    def use(hidden: Tensor, head: LMHead) -> Tensor:
        sums, labels, shared = over_group(rk.sequence_logprobs, sequence, pairs.labels)
        hidden = pairs.hidden_of(hidden)
        options = head.options() | shared | {"cu_seqlens": pairs.cu_seqlens}
        return sums(hidden, head.weight, labels, **options).logprobs

    return model(pairs.batch, use)


def content_key(
    model: FusedLM, groups: list[Group], plan: list[list[MicroBatch]], pad_id: int, device: str, layout: bool | str
) -> str:
    """A digest of all that reference log-probs depend on, to the bit: weights, tokens, padding, precision, code.

    layout: whether prompts are shared, or "flat".
    """
    digest = hashlib.blake2b(digest_size=20)
    names = ("_name_or_path", "transformers_version")  # a model's place does not change its output
    config = {key: value for key, value in model.model.config.to_dict().items() if key not in names}
    attention = getattr(model.model.config, "_attn_implementation", None)
    versions = [LAYOUT, rk.__version__, torch.__version__, transformers.__version__]
    head = [model.logit_scale, model.logit_softcap]
    together = 1 if model.sequence is None else model.sequence.size
    passes = [device, model.bf16, attention, pad_id, plan, layout, *([together] if together > 1 else [])]
    setting = [versions, passes, head, type(model.model).__name__, config]
    digest.update(json.dumps(setting, sort_keys=True, default=str).encode())
    digest.update(json.dumps([[group.prompt, group.responses] for group in groups]).encode())
    for name, tensor in _named_tensors(model.model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _load(path: Path, responses: int) -> Tensor | None:
    """The cached log-probs, [responses], or None. A damaged file is reported, and computed again by the caller."""
    try:
        with safe_open(path, "pt") as file:
            logps, checksum = file.get_tensor("logps"), (file.metadata() or {}).get("checksum")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        warnings.warn(f"cached reference log-probs {path} are unreadable and computed again: {error}", stacklevel=2)
        return None
    if logps.shape != (responses,) or logps.dtype != torch.float32 or checksum != _checksum(logps):
        warnings.warn(f"cached reference log-probs {path} are damaged and computed again", stacklevel=2)
        return None
    return logps


def _save(path: Path, logps: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({"logps": logps}, metadata={"checksum": _checksum(logps)}))


def _checksum(tensor: Tensor) -> str:
    return checksum(tensor.contiguous().numpy().tobytes())


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf_trainer" / "reference_logps"
