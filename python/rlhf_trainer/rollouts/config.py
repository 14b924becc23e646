"""Configurations of commands that generate completions, and of `rlhf sample`."""

import math
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from ..config.base import DATA, GENERATION, MODEL, SERVER, DataConfig, OutputConfig, at_least
from ..errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"  # of vLLM's own default port
Kind = Literal["none", "auto", "lora", "folder"]  # of weight_sync
WEIGHT_SYNC_HELP = (
    "How the policy's weights come to the server: never; as an adapter that it loads (vLLM); as a folder that it reads "
    "(vLLM, SGLang, transformers serve); auto: as an adapter, if that is what trains, or else as a folder."
)


@dataclass(kw_only=True)
class ServerConfig(OutputConfig):
    """Options of commands whose completions may come from HTTP servers; their names are TRL's where it has them."""

    use_vllm: bool = SERVER.option(False, "A server generates: vLLM, or another that is OpenAI-compatible.")
    vllm_mode: Literal["server", "colocate"] = SERVER.option(
        "server", "A server of its own; colocate is not there yet."
    )
    vllm_server_base_url: str | None = SERVER.option(
        None, f"The server; default: {DEFAULT_URL}, where rlhf serve-vllm starts one.", may_change=True
    )
    vllm_server_urls: list[str] = SERVER.several("Several servers of one model, which share the work.", may_change=True)
    vllm_server_timeout: float = SERVER.option(
        240.0, "Seconds to wait for a server that is down, when a run begins and within it.", may_change=True
    )
    weight_sync: Kind = SERVER.option("none", WEIGHT_SYNC_HELP)
    server_model: str | None = SERVER.option(None, "The model's name on the server; default: its name here.")
    server_prompts: Literal["ids", "text"] = SERVER.option("ids", "How prompts travel: vLLM and SGLang take token ids.")
    server_timeout: float = SERVER.option(600.0, "Seconds to wait for an answer.", may_change=True)
    server_retries: int = SERVER.option(
        4, "How often a request that failed is sent again, after 1, 2, 4, ... seconds.", may_change=True
    )
    server_concurrency: int = SERVER.option(64, "Requests under way at the same time.", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "server_retries", "vllm_server_timeout")
        at_least(self, 1, "server_concurrency")
        if not 0 < self.server_timeout < math.inf:
            raise UsageError(f"server_timeout must be a positive number of seconds, got {self.server_timeout}")
        if self.vllm_server_base_url is not None and self.vllm_server_urls:
            raise UsageError(
                "vllm_server_base_url is one server, vllm_server_urls are all of several: pass one of them"
            )
        for url in self.server_urls:
            check_url(url)
        options = [name for name in ("vllm_server_base_url", "vllm_server_urls", "server_model") if getattr(self, name)]
        options += ["weight_sync"] if self.weight_sync in ("lora", "folder") else []
        if options and not self.use_vllm:
            raise UsageError(f"{options[0]} is for a server: pass use_vllm")
        if self.use_vllm and self.vllm_mode == "colocate":
            raise UsageError(
                "vllm_mode colocate: vLLM does not run within this process yet. Start it beside, as rlhf serve-vllm "
                "--model_name_or_path MODEL, and pass vllm_mode server"
            )

    @property
    def server_urls(self) -> list[str]:
        return self.vllm_server_urls or [self.vllm_server_base_url or DEFAULT_URL]


def check_url(url: str) -> None:
    """UsageError, without what may be a secret, for what is not the address of a server, and nothing more."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half of an IPv6 address, a port that is no number
        whole = False
    if not whole or not (url.isascii() and url.isprintable()) or any(mark in url for mark in "@?# "):
        raise UsageError(
            "vllm_server_base_url must start with http:// or https:// and be the address of a server alone, as "
            "http://host:8000, without user, password, ? or #; a key goes into the environment, as RLHF_SERVER_KEY"
        )


@dataclass(kw_only=True)
class GenerationConfig(OutputConfig, DataConfig):
    """Options of commands that generate completions of a data set's prompts."""

    dataset_name: str = DATA.required("Prompts: a .jsonl, .json, .csv or .parquet file, or a hub id.", names_input=True)
    max_prompts: int | None = DATA.option(None, "Take only so many prompts, from the start.")
    max_prompt_length: int = DATA.option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_new_tokens: int = GENERATION.option(512, "A completion ends here at the latest.")
    temperature: float = GENERATION.option(1.0, "Divides the logits; 0 takes the likeliest token.")
    top_k: int = GENERATION.option(0, "Sample from the k likeliest tokens; 0: from all.")
    top_p: float = GENERATION.option(1.0, "Sample from the likeliest tokens that together have this probability.")
    per_device_generation_batch_size: int = GENERATION.option(32, "Completions generated, or scored, at once.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "temperature", "top_k")
        at_least(self, 1, "max_prompts", "max_prompt_length", "max_new_tokens", "per_device_generation_batch_size")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(kw_only=True)
class SampleConfig(GenerationConfig, ServerConfig):
    """Options of `rlhf sample`."""

    models: list[str] = MODEL.several(
        "The models that write: local folders or hub ids. Each writes num_completions a prompt.", names_input=True
    )
    dataset_train_split: str = DATA.option("train", "The split of a hub data set.")
    num_completions: int = GENERATION.option(10, "Completions a prompt, of each model; 10 to 30 is usual.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_completions")
        if not self.models:
            raise UsageError("models: name at least one model that writes")
        if self.server_model is not None and len(self.models) > 1:
            raise UsageError("server_model is the name of one model on the server, and models has several")


@dataclass(kw_only=True)
class ServeVLLMConfig:
    """Options of `rlhf serve-vllm`."""

    model_name_or_path: str = MODEL.required("The model that is trained: a local folder or a hub id.")
    vllm: str = SERVER.option("vllm", "The program, if it is not on PATH: that of another environment, say.")
    dtype: Literal["bfloat16", "float16", "float32"] = SERVER.option("bfloat16", "The dtype of the server's weights.")
    host: str = SERVER.option("127.0.0.1", "Where to listen. Only of loopback are whole weights taken.")
    port: int = SERVER.option(8000, "The port to listen at.")
    max_lora_rank: int = SERVER.option(64, "The largest lora_r of adapters; 0: none are taken.")
    vllm_server_timeout: float = SERVER.option(600.0, "Seconds to wait until it serves.")
    vllm_args: str = SERVER.option("", "More arguments of vllm serve, in one text: '--tensor-parallel-size 2'.")

    def __post_init__(self) -> None:
        at_least(self, 0, "max_lora_rank", "vllm_server_timeout")
        at_least(self, 1, "port")
