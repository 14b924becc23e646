"""`rlhf sample`: completions of prompts by one or several models, for `rlhf rejection` to choose from.

Text travels, not token ids: what is written here is encoded again by whoever reads it (`data.encoding`),
with a tokenizer of its own, and ends with that tokenizer's end of sequence. A completion that a
model ended at once is empty; it stays, so that each prompt has num_completions, and is counted.

With use_vllm, a server writes, and each of models is the folder or hub id of what it serves, or loads when it is that
model's turn (weight_sync): the tokenizer is needed here, the weights are not. What the server fails at goes to
failures.jsonl, which is a dataset of prompts again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.completions import COMPLETIONS_FILE, row_of
from ..data.encoding import Codec, is_empty
from ..data.examples import Prompt
from ..errors import UsageError
from ..models.checks import check_fit
from ..models.loading import load_causal_lm, load_codec, loading_of, meta_model, stop_at, ties_head
from ..training.journal import Journal, batches_of_like_length, write_jsonl
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import SampleConfig
from .generation import Completion, completion_text, generate_batch
from .loading import SHORTER, make_sampler, prompts_of, sampling_of
from .sampler import Failure, request_of
from .server import ServerSampler
from .weight_sync import POLICY_FOLDER

FAILURES_FILE = "failures.jsonl"


class Part(NamedTuple):
    """The work of one model. `number`: the place of its first batch among those of all models; it seeds the draws."""

    model: str
    codec: Codec
    prompts: list[Prompt]  # each num_completions times
    batches: list[list[int]]  # positions in `prompts`
    number: int
    server: ServerSampler | None  # None: the model is loaded here, when it is its turn
    ties: bool  # its head to its embeddings


class Written(NamedTuple):
    """A completion's text, and whether it ended; or, where `finished` is None, the reason why there is none."""

    text: str
    finished: bool | None


def sample(config: SampleConfig) -> Path:
    """Writes output_dir/completions.jsonl: by model, then by prompt; returns output_dir."""
    device = single_process("rlhf sample")
    if not begin(config):
        return Path(config.output_dir)
    duplicates = sorted({name for name in config.models if config.models.count(name) > 1})
    if duplicates:
        raise UsageError(f"models: duplicate {duplicates[0]!r}; for more completions raise num_completions")

    parts: list[Part] = []
    for name in config.models:  # everything but the weights is checked before any model works for hours
        codec = load_codec(name, config, key="models")
        read = prompts_of(config, codec, config.dataset_train_split).examples
        prompts = [prompt for prompt in read for _ in range(config.num_completions)]
        batches = batches_of_like_length([prompt.length for prompt in prompts], config.per_device_generation_batch_size)
        lengths = [prompt.length + config.max_new_tokens for prompt in prompts]
        model = meta_model(name, key="models", trust_remote_code=config.trust_remote_code)
        check_fit(model, codec.tokenizer, [prompt.row for prompt in prompts], lengths, config.dataset_name, SHORTER)
        stop_at(model, codec)
        server = make_sampler(config, model, codec.tokenizer, name) if config.use_vllm else None
        parts.append(
            Part(name, codec, prompts, batches, sum(len(part.batches) for part in parts), server, ties_head(model))
        )

    work = open_output(config)
    total = sum(len(part.batches) for part in parts)
    data = [(part.model, [prompt.ids for prompt in part.prompts]) for part in parts]
    with Journal(work / "progress.jsonl", total, "rlhf sample", data) as progress:
        lines = [line for part in parts for line in completions_of(config, part, progress, device, work)]
    rows, failures = [line for line in lines if "reason" not in line], [line for line in lines if "reason" in line]
    write_jsonl(work / COMPLETIONS_FILE, rows)
    if failures:
        write_jsonl(work / FAILURES_FILE, failures)
    progress.remove()
    shutil.rmtree(work / POLICY_FOLDER, ignore_errors=True)
    folder = commit_output(config)
    print(summary(rows, len({row["prompt_row"] for row in rows})) + f"; saved to {folder / COMPLETIONS_FILE}")
    if failures:
        print(f"{len(failures)} more failed, and are in {folder / FAILURES_FILE}; the first: {failures[0]['reason']}")
    return folder


def completions_of(
    config: SampleConfig, part: Part, progress: Journal, device: torch.device, work: Path
) -> list[dict[str, Any]]:
    """The rows of one model, in the order of its prompts."""
    draw = drawer_of(config, part, device, work)
    rows: dict[int, dict[str, Any]] = {}
    for number, positions in enumerate(part.batches, start=part.number):
        prompts = [part.prompts[i] for i in positions]

        def write(number: int = number, prompts: list[Prompt] = prompts) -> list[Written]:
            return [
                Written(done.reason, None)
                if isinstance(done, Failure)
                else Written(completion_text(part.codec.tokenizer, done, prompt.ids), done.finished)
                for prompt, done in zip(prompts, draw(prompts, number), strict=True)
            ]

        for i, prompt, written in zip(positions, prompts, progress.run(write), strict=True):
            rows[i] = row_of(prompt, part.model, *written)
    return [rows[i] for i in range(len(rows))]


def drawer_of(
    config: SampleConfig, part: Part, device: torch.device, work: Path
) -> Callable[[list[Prompt], int], list[Completion | Failure]]:
    """The function (prompts, batch number) -> completions: by the server, or by the model, loaded here."""
    sampling = sampling_of(config)
    if part.server is not None:
        if config.weight_sync != "none" and part.server.way.unties and part.ties:
            model = load_causal_lm(part.model, key="models", **loading_of(config))
            part.server.sync(model, part.codec.tokenizer, work / POLICY_FOLDER)
        elif config.weight_sync != "none":
            part.server.load(str(Path(part.model).resolve()) if Path(part.model).exists() else part.model)
        return lambda prompts, number: part.server.generate(
            [request_of(prompt, config.dataset_name) for prompt in prompts], sampling, seed=config.seed, number=number
        )
    model = load_causal_lm(part.model, key="models", **loading_of(config)).to(device)
    stop_at(model, part.codec)
    return lambda prompts, number: generate_batch(
        model, part.codec.tokenizer, [prompt.ids for prompt in prompts], sampling, seed=config.seed, number=number,
        bf16=config.bf16,
    )  # fmt: skip


def summary(rows: list[dict[str, Any]], prompts: int) -> str:
    cut = sum(not row["finished"] for row in rows)
    empty = sum(is_empty(row["completion"]) for row in rows)
    return f"{len(rows)} completions of {prompts} prompts; {cut} did not end within max_new_tokens, {empty} are empty"
