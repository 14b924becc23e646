"""The sampler, the prompts and the sampling options of a configuration."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import Codec
from ..data.examples import Loaded, Prompt, load_prompts, reading_of
from .config import GenerationConfig, ServerConfig
from .generation import Sampling, end_ids
from .http_json import Server
from .sampler import LocalSampler, Sampler
from .server import ServerSampler, check_servers
from .weight_sync import adapter_problem, choose_sync

SHORTER = "prompt and max_new_tokens together may have at most {positions}"  # advice where a model is too short


def make_sampler(
    config: ServerConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | None = None
) -> Sampler:
    """The servers, if there are any and they answer, else the model itself. `folder`: of a model without weights."""
    if not config.use_vllm:
        return LocalSampler(model, tokenizer, config.bf16)
    patience_s, name = config.vllm_server_timeout, config.server_model or model.name_or_path
    servers = [
        Server(url, config.server_timeout, config.server_retries, patience_s=patience_s) for url in config.server_urls
    ]
    names = check_servers(servers, patience_s)
    way = choose_sync(config.weight_sync, adapter_problem(model, folder), servers)
    if way is not None and config.server_model is None and names and name not in names:
        name = names[0]  # its weights will be the policy's, whatever the server calls them
    return ServerSampler(
        servers, name, tokenizer, ends=end_ids(model, tokenizer), prompts=config.server_prompts, way=way,
        vocabulary=model.get_input_embeddings().weight.shape[0], concurrency=config.server_concurrency,
    )  # fmt: skip


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
