"""The models, data and rewards of a run that learns from its own completions, loaded and checked."""

from typing import NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..data.encoding import Codec
from ..data.examples import Loaded, Prompt, load_prompts, reading_of
from ..data.views import first_rows, has_colours
from ..errors import UsageError
from ..models.checks import check_fit, pad_id_of
from ..models.fused_lm import FusedLM, check_same_vocabulary, load_fused, load_policy
from ..models.loading import load_codec_for, make_room
from ..models.lora import Reference
from ..rewards.loading import load_rewards
from ..rewards.rewards import Rewards
from ..training.files import checksum
from ..training.fsdp import place
from ..training.loop import start_accelerator
from ..training.output_folder import begin
from .config import OnlineConfig
from .environment import Environment

SHORTER = "max_prompt_length and max_completion_length together may be at most {positions}"


class Setup(NamedTuple):
    """The models, data and rewards of a run."""

    config: OnlineConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    policy: FusedLM
    reference: FusedLM | Reference | None
    rewards: Rewards
    environment: Environment | None = None

    @property
    def reward_names(self) -> tuple[str, ...]:
        return self.rewards.names if self.environment is None else (*self.rewards.names, "environment")

    def sources(self) -> list[tuple[str, list[Prompt]]]:
        """The data sets, by name, and what was read from them."""
        both = [(self.config.dataset_name, self.prompts), (str(self.config.eval_dataset), self.held_out)]
        return [(source, prompts) for source, prompts in both if prompts]

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.tokenizer)


def prepare(config: OnlineConfig) -> Setup | None:
    """Loads and checks everything before any completion is drawn; None where the run is finished already."""
    accelerator = start_accelerator(config)
    if not begin(config, accelerator.is_main_process):
        return None
    codec, largest = load_codec_for(config)
    tokenizer = codec.tokenizer
    rewards = load_rewards(config, accelerator.device, batch_size=config.per_device_generation_batch_size)
    for reward in rewards.models:
        place(reward.model, accelerator, bf16=False)  # whole while it rewards
    prompts = prompts_of(config, config.dataset_name, config.dataset_train_split, codec, rewards, accelerator)
    held_out = []
    if config.eval_dataset is not None:
        held_out = prompts_of(config, config.eval_dataset, config.dataset_test_split, codec, rewards, accelerator)
    if config.inspect_rows:
        accelerator.print(first_rows(prompts, tokenizer, config.inspect_rows, has_colours()))
    environment = None if config.environment is None else Environment(config.environment, codec)
    policy = load_policy(config, codec, largest)
    for source, part in ((config.dataset_name, prompts), (config.eval_dataset, held_out)):
        if part:
            lengths = [prompt.length + config.max_completion_length for prompt in part]
            if environment is not None:
                environment.check(part, str(source))
            check_fit(policy.model, tokenizer, [prompt.row for prompt in part], lengths, str(source), SHORTER)
    reference = None
    if config.beta and config.use_peft and config.ref_model_name_or_path is None:
        reference = Reference(policy)
    elif config.beta:
        key = "model_name_or_path" if config.ref_model_name_or_path is None else "ref_model_name_or_path"
        reference = load_fused(config, getattr(config, key), key)
        make_room(reference.model, tokenizer)
        check_same_vocabulary(policy, reference, key)
        place(reference, accelerator, bf16=config.bf16)
    elif config.ref_model_name_or_path is not None:
        raise UsageError("ref_model_name_or_path: with beta 0 nothing is compared with it; set beta, or drop it")
    return Setup(config, accelerator, tokenizer, prompts, held_out, policy, reference, rewards, environment)


def prompts_of(
    config: OnlineConfig,
    source: str,
    split: str,
    codec: Codec,
    rewards: Rewards,
    accelerator: Accelerator,
) -> list[Prompt]:
    """The prompts that have the columns that the rewards need."""
    loaded = read_prompts(config, codec, source, split)
    if not config.skip_invalid_rows:
        rewards.check(loaded.examples, source, config.max_completion_length)
        accelerator.print(loaded.report(source))
        return loaded.examples
    prompts, skipped = [], list(loaded.skipped)
    for prompt in loaded.examples:
        try:
            rewards.check([prompt], source, config.max_completion_length)
            prompts.append(prompt)
        except UsageError as error:
            skipped.append(str(error))
    if not prompts:
        raise UsageError(f"{source}: no row can be used: {skipped[0]}")
    accelerator.print(loaded._replace(examples=prompts, skipped=skipped).report(source))
    return prompts


def read_prompts(config: OnlineConfig, codec: Codec, source: str, split: str) -> Loaded[Prompt]:
    return load_prompts(source, codec, max_prompt_length=config.max_prompt_length, **reading_of(config, split))


def data_checksum(setup: Setup) -> str:
    """A checksum of the rows, which must be the same when a run is resumed."""
    rows = [[(p.ids, sorted(p.columns.items())) for p in part] for part in (setup.prompts, setup.held_out)]
    return checksum(repr(rows).encode())
