"""`rlhf evaluate`: a model answers held-out prompts; its answers get rewards beside those of the data.

Measured are, each with a 95% interval:
- win rate: how often the model's answer gets a higher reward than the data's answer to the same prompt. Equal rewards
  count half; an empty answer loses. Wilson's interval.
- over prompts, the mean reward, the mean length in tokens of the model's tokenizer, the mean of KL(model || reference).
  Bootstrap intervals over prompts.
KL of an answer is the exact divergence of the two next-token distributions before each of its tokens, summed, in nats.
Its mean estimates the KL of whole answers where they are drawn from the model as it is: temperature 1, no top_k, no
top_p. An answer that was cut at max_new_tokens is scored as it is. An empty one has no reward.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.completions import text_of
from ..data.encoding import Codec, encode_pairs, is_empty, like_prompt
from ..data.examples import Prompt
from ..data.rows import listing
from ..errors import RowError, UsageError
from ..models.checks import check_fit, pad_id_of
from ..models.fused_lm import FusedLM, check_same_vocabulary, load_fused
from ..models.kl import kl_of_sequences
from ..models.loading import load_codec, stop_at
from ..rewards.loading import load_rewards
from ..rewards.model_rewards import check_positions
from ..rewards.rewards import Rewards
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


def evaluate(config: EvaluateConfig) -> Path:
    """Writes report.json and samples.jsonl into output_dir, which it returns, and prints a table."""
    device = single_process("rlhf evaluate")
    if not begin(config):
        return Path(config.output_dir)
    codec = load_codec(config.model_name_or_path, config, key="model_name_or_path")
    prompts = prompts_of(config, codec, config.dataset_test_split).examples
    rewards = load_rewards(config, device, batch_size=config.per_device_generation_batch_size)
    rewards.check(prompts, config.dataset_name)
    theirs = answers_of_data(config, prompts, codec, rewards)
    models = load_models(config, prompts, codec)

    work = open_output(config)
    data = [(prompt.ids, dict(prompt.columns), answer) for prompt, answer in zip(prompts, theirs, strict=True)]
    batches = math.ceil(len(prompts) / config.per_device_generation_batch_size) * len(models)
    with Journal(work / "progress.jsonl", batches, "rlhf evaluate", data) as progress:
        completions, kl = answer_prompts(config, prompts, models, codec, device, progress.run)
        ours = [
            Answer(like_prompt(prompt.prompt, completion_text(codec.tokenizer, done, prompt.ids)), len(done.ids))
            for prompt, done in zip(prompts, completions, strict=True)
        ]
        our_rewards, their_rewards = score_answers(prompts, [ours, theirs], rewards, progress)
    columns = {
        "prompt": [prompt.prompt for prompt in prompts], "prompt_row": [prompt.row for prompt in prompts],
        "completion": [own.content for own in ours], "finished": [done.finished for done in completions],
        "tokens": [own.tokens for own in ours], "reward": our_rewards,
        "answer": [other and other.content for other in theirs],
        "answer_tokens": [other and other.tokens for other in theirs], "answer_reward": their_rewards, "kl_nats": kl,
    }  # fmt: skip
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    report = report_of(config, samples)
    write_jsonl(work / "samples.jsonl", samples)
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.remove()
    folder = commit_output(config)
    print(table(report) + f"\nsaved to {folder}")
    return folder


def answers_of_data(
    config: EvaluateConfig, prompts: Sequence[Prompt], codec: Codec, rewards: Rewards
) -> list[Answer | None]:
    """The data's answers, None where there is none. An unusable one is a UsageError; if rows may be skipped, it is
    printed and left out."""
    answers: list[Answer | None] = [None] * len(prompts)
    problems: list[str] = []
    for i, prompt in enumerate(prompts):
        if prompt.answer is None:
            continue
        try:
            _, (ids,) = encode_pairs(codec, prompt.prompt, [("answer", prompt.answer)], prompt.options)
            for model in rewards.models:
                length = len(model.ids(prompt, text_of(prompt.answer)))
                check_positions(model.model, model.source, [prompt], [length])
            answers[i] = Answer(prompt.answer, len(ids))
        except (RowError, UsageError) as error:
            problems.append(f"row {prompt.row}, {error}" if isinstance(error, RowError) else str(error))
    if problems:
        message = f"{config.dataset_name}: {len(problems)} answers of the data cannot be used:\n{listing(problems)}"
        if not config.skip_invalid_rows:
            raise UsageError(f"{message}\nFix them, or pass --skip_invalid_rows to compare on the others.")
        print(message)
    return answers


def load_models(config: EvaluateConfig, prompts: Sequence[Prompt], codec: Codec) -> list[FusedLM]:
    """The policy and, where there is one, its reference, on the CPU until it is their turn; UsageError where they do
    not fit each other or the prompts."""
    rows, lengths = [prompt.row for prompt in prompts], [prompt.length + config.max_new_tokens for prompt in prompts]
    models: list[FusedLM] = []
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        name = getattr(config, key)
        if name is not None:
            models.append(load_fused(config, name, key))
            stop_at(models[-1].model, codec)
            check_fit(models[-1].model, codec.tokenizer, rows, lengths, config.dataset_name, SHORTER)
            check_same_vocabulary(models[0], models[-1], key)
    return models


def answer_prompts(
    config: EvaluateConfig, prompts: Sequence[Prompt], models: Sequence[FusedLM], codec: Codec, device: torch.device,
    run: RunBatch,
) -> tuple[list[Completion], list[float | None]]:  # fmt: skip
    """One completion a prompt, and its KL if there is a reference."""
    policy, *references = models
    ids, tokenizer, batch_size = [p.ids for p in prompts], codec.tokenizer, config.per_device_generation_batch_size
    completions = generate(
        policy.to(device).model, tokenizer, ids, sampling_of(config), batch_size=batch_size, seed=config.seed,
        bf16=config.bf16, run=run,
    )  # fmt: skip
    kl: list[float | None] = [None] * len(prompts)
    for reference in references:
        sequences = list(zip(ids, [done.ids for done in completions], strict=True))
        kl = [*kl_of_sequences(policy, reference.to(device), sequences, batch_size, pad_id_of(tokenizer), run)]
        reference.to("cpu")
    policy.to("cpu")  # room for the reward models
    return completions, kl


def score_answers(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]], rewards: Rewards, progress: Journal
) -> list[list[float | None]]:
    """Rewards of the answers, list by list; None where there is no answer or an empty one."""
    pairs = [
        (prompt, text_of(answer.content) if answer and not is_empty(answer.content) else None)
        for column in answers
        for prompt, answer in zip(prompts, column, strict=True)
    ]
    scored, texts = [prompt for prompt, text in pairs if text], [text for _, text in pairs if text]
    progress.expect(rewards.batch_count(scored, texts) if texts else 0)
    values = iter(rewards(scored, texts, run=progress.run).total.tolist())
    results = [next(values) if text else None for _, text in pairs]
    return [results[k : k + len(prompts)] for k in range(0, len(results), len(prompts))]
