"""`rlhf evaluate`: a model answers held-out prompts; a reward model scores its answers beside those of the data.

Measured are, each with a 95% interval:
- win rate: how often the model's answer gets a higher reward than the data's answer to the same prompt. Equal rewards
  count half; an empty answer loses. Wilson's interval.
- over prompts, the mean reward, the mean length in tokens of the model's tokenizer, the mean of KL(model || reference).
  Bootstrap intervals over prompts.
KL of an answer is the exact divergence of the two next-token distributions before each of its tokens, summed, in nats.
Its mean estimates the KL of whole answers where they are drawn from the model as it is: temperature 1, no top_k, no
top_p. An answer that was cut at max_new_tokens is scored as it is. An empty one has no reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import template_options
from ..data.encoding import Codec, encode_pairs, encode_rendering, is_empty, like_prompt
from ..data.examples import Prompt
from ..data.rows import listing
from ..errors import RowError, UsageError
from ..models.checks import check_fit, pad_id_of
from ..models.fused_lm import FusedLM, check_same_vocabulary, load_fused
from ..models.kl import kl_of_sequences
from ..models.loading import load_codec
from ..models.scoring import batch_count, load_reward_model, score_sequences
from ..rollouts.generation import Completion, completion_text, generate
from ..rollouts.loading import SHORTER, prompts_of, sampling_of
from ..training.journal import Journal, RunBatch, write_jsonl
from ..training.output_folder import begin, commit_output, open_output
from ..training.processes import single_process
from .config import EvaluateConfig
from .report import report_of, table


class Answer(NamedTuple):
    """One answer to a prompt, by the model or of the data."""

    content: Any  # text, or messages after messages
    tokens: int  # of the model's tokenizer, with the end
    reward_ids: list[int] | None  # prompt and answer in the reward model's tokens; None: empty


def evaluate(config: EvaluateConfig) -> Path:
    """Writes report.json and samples.jsonl into output_dir, which it returns, and prints a table."""
    device = single_process("rlhf evaluate")
    if not begin(config):
        return Path(config.output_dir)
    codec, reward_codec = (
        load_codec(getattr(config, key), config, key=key) for key in ("model_name_or_path", "reward_model_name_or_path")
    )
    tokenizer, reward_tokenizer = codec.tokenizer, reward_codec.tokenizer
    prompts = prompts_of(config, codec, config.dataset_test_split).examples
    check_prompts(config, prompts, reward_codec)
    theirs = answers_of_data(config, prompts, codec, reward_codec)
    models = load_models(config, prompts, theirs, tokenizer, reward_tokenizer)

    work = open_output(config)
    data = [(prompt.ids, answer and answer.reward_ids) for prompt, answer in zip(prompts, theirs, strict=True)]
    batches = math.ceil(len(prompts) / config.per_device_generation_batch_size) * (
        1 if config.ref_model_name_or_path is None else 2
    )
    with Journal(work / "progress.jsonl", batches, "rlhf evaluate", data) as progress:
        completions, kl = answer_prompts(config, prompts, models, tokenizer, device, progress.run)
        ours = [
            own_answer(config, prompt, completion, tokenizer, reward_codec)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rewards, their_rewards = score_answers(
            config, prompts, [ours, theirs], models.reward_model, reward_tokenizer, device, progress
        )
    samples = [
        {
            "prompt": prompt.prompt, "prompt_row": prompt.row, "completion": own.content, "finished": done.finished,
            "tokens": own.tokens, "reward": reward, "answer": other and other.content,
            "answer_tokens": other and other.tokens, "answer_reward": their_reward, "kl_nats": nats,
        }
        for prompt, own, done, reward, other, their_reward, nats in zip(
            prompts, ours, completions, rewards, theirs, their_rewards, kl, strict=True
        )
    ]  # fmt: skip
    report = report_of(config, samples)
    write_jsonl(work / "samples.jsonl", samples)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.remove()
    folder = commit_output(config)
    print(table(report) + f"\nsaved to {folder}")
    return folder


def answers_of_data(
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    codec: Codec,
    reward_codec: Codec,
) -> list[Answer | None]:
    """The data's answers, None where there is none. An unusable one is a UsageError; if rows may be skipped, it is
    printed and left out."""
    answers: list[Answer | None] = []
    problems: list[str] = []
    for prompt in prompts:
        answer = None
        if prompt.answer is not None:
            try:
                _, (ids,) = encode_pairs(codec, prompt.prompt, [("answer", prompt.answer)], options_of(prompt))
                answer = Answer(prompt.answer, len(ids), reward_ids_of(reward_codec, prompt, prompt.answer))
            except RowError as error:
                problems.append(f"row {prompt.row}, {error}")
        answers.append(answer)
    if problems:
        message = f"{config.dataset_name}: {len(problems)} answers of the data cannot be used:\n{listing(problems)}"
        if not config.skip_invalid_rows:
            raise UsageError(f"{message}\nFix them, or pass --skip_invalid_rows to compare on the others.")
        print(message)
    return answers


def check_prompts(config: EvaluateConfig, prompts: Sequence[Prompt], reward_codec: Codec) -> None:
    """UsageError where the reward model's tokenizer, say without a chat template, makes nothing of a prompt."""
    for prompt in prompts:
        try:
            reward_ids_of(reward_codec, prompt, like_prompt(prompt.prompt, ""))
        except RowError as error:
            raise UsageError(
                f"{config.dataset_name}, row {prompt.row}, for the tokenizer of {config.reward_model_name_or_path}: "
                f"{error}"
            ) from error


def options_of(prompt: Prompt) -> dict[str, Any]:
    return template_options(dict(prompt.columns))


def reward_ids_of(reward_codec: Codec, prompt: Prompt, content: Any) -> list[int]:
    return encode_rendering(reward_codec, prompt.prompt, content, "answer", options_of(prompt))


def own_answer(
    config: EvaluateConfig,
    prompt: Prompt,
    completion: Completion,
    tokenizer: PreTrainedTokenizerBase,
    reward_codec: Codec,
) -> Answer:
    content = like_prompt(prompt.prompt, completion_text(tokenizer, completion))
    try:
        reward_ids = None if is_empty(content) else reward_ids_of(reward_codec, prompt, content)
    except RowError as error:
        raise UsageError(f"{config.dataset_name}, row {prompt.row}, the model's answer {content!r}: {error}") from error
    return Answer(content, len(completion.ids), reward_ids)


class Models(NamedTuple):
    policy: FusedLM
    reference: FusedLM | None
    reward_model: PreTrainedModel


def load_models(
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    theirs: Sequence[Answer | None],
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> Models:
    """All models, on the CPU until it is their turn; UsageError where they do not fit each other or the prompts."""
    rows = [prompt.row for prompt in prompts]

    lengths = [prompt.length + config.max_new_tokens for prompt in prompts]

    def load(key: str) -> FusedLM:
        fused = load_fused(config, getattr(config, key), key)
        check_fit(fused.model, tokenizer, rows, lengths, config.dataset_name, SHORTER)
        return fused

    policy = load("model_name_or_path")
    reference = None if config.ref_model_name_or_path is None else load("ref_model_name_or_path")
    if reference is not None:
        check_same_vocabulary(policy, reference, "ref_model_name_or_path")
    reward_model = load_reward_model(
        config.reward_model_name_or_path, key="reward_model_name_or_path",
        attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    # The lengths of the model's own answers in the reward model's tokens will be known when they are written.
    lengths = [len(answer.reward_ids) if answer and answer.reward_ids else 0 for answer in theirs]
    check_fit(reward_model, reward_tokenizer, rows, lengths, config.dataset_name, "leave it out")
    return Models(policy, reference, reward_model)


def answer_prompts(
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    run: RunBatch,
) -> tuple[list[Completion], list[float | None]]:
    """One completion a prompt, and its KL if there is a reference."""
    policy = models.policy.to(device)
    completions = generate(
        policy.model, tokenizer, [prompt.ids for prompt in prompts], sampling_of(config),
        batch_size=config.per_device_generation_batch_size, seed=config.seed, bf16=config.bf16, run=run,
    )  # fmt: skip
    kl: list[float | None] = [None] * len(prompts)
    if models.reference is not None:
        sequences = [(prompt.ids, done.ids) for prompt, done in zip(prompts, completions, strict=True)]
        reference = models.reference.to(device)
        kl = [
            *kl_of_sequences(
                policy, reference, sequences, config.per_device_generation_batch_size, pad_id_of(tokenizer), run
            )
        ]
        reference.to("cpu")
    policy.to("cpu")  # room for the reward model
    return completions, kl


def score_answers(
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer | None]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    progress: Journal,
) -> list[list[float | None]]:
    """Rewards of the answers, list by list; None where there is no answer or an empty one."""
    scored = [
        (prompt.row, answer.reward_ids)
        for column in answers
        for prompt, answer in zip(prompts, column, strict=True)
        if answer and answer.reward_ids
    ]
    if not scored:
        return [[None] * len(prompts) for _ in answers]
    sequences = [ids for _, ids in scored]
    rows, lengths = [row for row, _ in scored], [len(ids) for ids in sequences]
    check_fit(model, tokenizer, rows, lengths, config.dataset_name, "leave it out")
    progress.expect(batch_count(sequences, config.per_device_generation_batch_size))
    rewards = score_sequences(
        model, sequences, config.per_device_generation_batch_size, pad_id_of(tokenizer), device, bf16=config.bf16,
        run=progress.run,
    )  # fmt: skip
    values = iter(rewards.tolist())
    return [[next(values) if answer and answer.reward_ids else None for answer in column] for column in answers]
