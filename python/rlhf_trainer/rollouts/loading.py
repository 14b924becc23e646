"""The sampler, the prompts and the sampling options of a configuration."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import Codec
from ..data.examples import Loaded, Prompt, load_prompts, reading_of
from .config import GenerationConfig, ServerConfig
from .generation import Sampling, end_ids
from .sampler import LocalSampler, Sampler
from .server import ServerSampler

SHORTER = "prompt and max_new_tokens together may have at most {positions}"  # advice where a model is too short


def make_sampler(config: ServerConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The server, if there is one and it answers, else the model itself."""
    if config.server_url is None:
        return LocalSampler(model, tokenizer, config.bf16)
    sampler = ServerSampler(
        config.server_url, config.server_model or model.name_or_path, tokenizer, ends=end_ids(model, tokenizer),
        vocabulary=model.get_input_embeddings().weight.shape[0], prompts=config.server_prompts,
        sync_mode=config.server_sync, timeout_s=config.server_timeout, retries=config.server_retries,
        concurrency=config.server_concurrency,
    )  # fmt: skip
    sampler.check()
    return sampler


def prompts_of(config: GenerationConfig, codec: Codec, split: str) -> Loaded[Prompt]:
    """The prompts of a command that generates; prints how many there are."""
    prompts = read_prompts(config, codec, config.dataset_name, split)
    print(prompts.report(config.dataset_name))
    return prompts


def read_prompts(config: GenerationConfig, codec: Codec, source: str, split: str) -> Loaded[Prompt]:
    return load_prompts(
        source, codec, max_prompt_length=config.max_prompt_length, max_examples=config.max_prompts,
        **reading_of(config, split),
    )  # fmt: skip


def sampling_of(config: GenerationConfig) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
