"""What a run that learns from its own completions has before it begins, loaded and checked."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..data.examples import Prompt, load_prompts
from ..errors import UsageError
from ..models.loading import (
    FusedLM,
    check_fit,
    check_same_vocabulary,
    checkpoint_gradients,
    load_fused,
    load_tokenizer_for,
    pad_id_of,
)
from ..rewards.rewards import Rewards, load_rewards
from ..training.loop import begin
from .config import OnlineConfig

SHORTER = "max_prompt_length and max_new_tokens together may be at most {positions}"


class Setup(NamedTuple):
    """Models, data and judges."""

    config: OnlineConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    policy: FusedLM
    reference: FusedLM | None
    rewards: Rewards

    def sources(self) -> list[tuple[str, list[Prompt]]]:
        """The data sets, by name, and what was read from them."""
        both = [(self.config.dataset, self.prompts), (str(self.config.eval_dataset), self.held_out)]
        return [(source, prompts) for source, prompts in both if prompts]

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.tokenizer)


def prepare(config: OnlineConfig) -> Setup | None:
    """Loads and checks everything before any completion is drawn; None where the run is finished already."""
    accelerator, finished = begin(config)
    if finished:
        return None
    tokenizer = load_tokenizer_for(config)
    rewards = load_rewards(config, accelerator.device, batch_size=config.generation_batch_size)
    prompts = prompts_of(config, config.dataset, config.dataset_split, tokenizer, rewards, accelerator)
    held_out = []
    if config.eval_dataset is not None:
        held_out = prompts_of(config, config.eval_dataset, config.eval_split, tokenizer, rewards, accelerator)
    policy = load_fused(config, config.model_name_or_path, "model_name_or_path")
    for source, part in ((config.dataset, prompts), (config.eval_dataset, held_out)):
        if part:
            lengths = [prompt.length + config.max_new_tokens for prompt in part]
            check_fit(policy.model, tokenizer, [prompt.row for prompt in part], lengths, str(source), SHORTER)
    reference = None
    if config.beta:
        key = "model_name_or_path" if config.ref_model_name_or_path is None else "ref_model_name_or_path"
        reference = load_fused(config, getattr(config, key), key).to(accelerator.device)
        check_same_vocabulary(policy, reference, key)
    elif config.ref_model_name_or_path is not None:
        raise UsageError("ref_model_name_or_path: with beta 0 nothing is compared with it; set beta, or drop it")
    if config.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    return Setup(config, accelerator, tokenizer, prompts, held_out, policy, reference, rewards)


def prompts_of(
    config: OnlineConfig,
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Rewards,
    accelerator: Accelerator,
) -> list[Prompt]:
    """Those that have what the rewards need."""
    loaded = load_prompts(
        source, tokenizer, split=split, max_prompt_length=config.max_prompt_length, format=config.dataset_format,
        streaming=config.streaming, skip_invalid_rows=config.skip_invalid_rows,
    )  # fmt: skip
    if not config.skip_invalid_rows:
        rewards.check(loaded.examples, source, config.max_new_tokens)
        accelerator.print(loaded.report(source))
        return loaded.examples
    prompts, skipped = [], list(loaded.skipped)
    for prompt in loaded.examples:
        try:
            rewards.check([prompt], source, config.max_new_tokens)
            prompts.append(prompt)
        except UsageError as error:
            skipped.append(str(error))
    if not prompts:
        raise UsageError(f"{source}: no row can be used: {skipped[0]}")
    accelerator.print(loaded._replace(examples=prompts, skipped=skipped).report(source))
    return prompts


def digest(setup: Setup) -> str:
    """Of what a run goes on with only if it is the same: the rows and the number of processes."""
    told = [[(p.ids, sorted(p.columns.items())) for p in part] for part in (setup.prompts, setup.held_out)]
    return hashlib.blake2b(repr((told, setup.accelerator.num_processes)).encode(), digest_size=16).hexdigest()
