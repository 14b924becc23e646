"""How the weights of a policy come to the servers that sample from it: as an adapter, or as a folder that they load.

Servers read what the trainer has saved, so they must see it under the same path.
"""

import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.loading import save_model
from ..models.lora import TRAINED, adapter_of, base_of
from ..training.fsdp import state_within
from .config import Kind
from .http_json import EXCERPT, RequestError, Server

POLICY_FOLDER = "policy"  # of the copy that servers load, in the folder of a run


class WeightSync(ABC):
    """One way for weights to come to a server, whole unless a subclass says otherwise. `saved`: the copy's folder.

    `path`: what a server that can be led this way takes POSTs to; `flags`: with which it was started.
    """

    path = flags = ""
    unties = False  # tied heads must be in the copy, too
    replaces = False  # weights in place, of which a server may keep some

    def __init__(self) -> None:
        self.lost: dict[str, int] = {}  # connections to each server, until weights had been sent

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved: Path) -> None:
        """Writes what travels."""
        save_model(model, tokenizer, saved, unties=self.unties)

    def send(self, server: Server, saved: str) -> None:
        """Loads the copy, and remembers that the server has it."""
        self.load(server, saved)
        self.lost[server.url] = server.lost_connections

    @abstractmethod
    def load(self, server: Server, saved: str) -> None:
        """Has the server load the copy; RequestError where it does not."""

    def name(self, saved: str, served: str) -> str:
        """The model to request of a server that, before, served `served`."""
        return served

    def is_served(self, server: Server, saved: str) -> bool:
        """Whether the server still has what was sent: one that was started anew has not."""
        return server.lost_connections == self.lost[server.url]

    def drop(self, server: Server, saved: str) -> None:  # noqa: B027 (most keep nothing)
        """Has the server forget a copy that nothing requests any more."""


class Adapter(WeightSync):
    """vLLM: only the adapter travels, and is a model beside the others, by its own name."""

    path = "/v1/load_lora_adapter"
    flags = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve ... --enable-lora --max-lora-rank R"

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}  # each new, as what a server has computed with an adapter goes by its name

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved: Path) -> None:
        adapted = adapter_of(model).model
        adapted.save_pretrained(saved, selected_adapters=[TRAINED], state_dict=state_within(adapted))

    def load(self, server: Server, saved: str) -> None:
        server.request(self.path, {"lora_name": self.name(saved, ""), "lora_path": saved, "load_inplace": True})

    def name(self, saved: str, served: str) -> str:
        return self.names.setdefault(saved, f"policy-{uuid.uuid4().hex}")

    def is_served(self, server: Server, saved: str) -> bool:
        return self.name(saved, "") in server.request("/v1/models", None, names_in)

    def drop(self, server: Server, saved: str) -> None:
        with suppress(RequestError):  # a server that was started anew has forgotten it
            server.request("/v1/unload_lora_adapter", {"lora_name": self.name(saved, "")})


class Workers(WeightSync):
    """vLLM: its workers read the folder. Requests under way are aborted, and so sent again, as half of their tokens
    would be of other weights than the rest.

    Of a layer that the folder does not name, a server on a CPU goes on with the copy that it packed when it started
    (vLLM 0.32), so that a head which shares the embeddings' weight is written out.
    """

    path = "/collective_rpc"
    flags = "VLLM_SERVER_DEV_MODE=1 vllm serve ..."
    unties = replaces = True

    def load(self, server: Server, saved: str) -> None:
        server.request("/pause?mode=abort", {})
        try:
            server.request(self.path, {"method": "reload_weights", "kwargs": {"weights_path": saved}})
            server.request("/reset_prefix_cache", {}, succeeded)
        finally:
            server.request("/resume", {})


class Reload(WeightSync):
    """SGLang's update_weights_from_disk."""

    path, flags = "/update_weights_from_disk", "python -m sglang.launch_server ..."
    replaces = True

    def load(self, server: Server, saved: str) -> None:
        server.request(self.path, {"model_path": saved}, succeeded)


class ByName(WeightSync):
    """transformers' serve loads what is requested: the folder is the model's name."""

    path, flags = "/load_model", "transformers serve"

    def load(self, server: Server, saved: str) -> None:
        pass

    def name(self, saved: str, served: str) -> str:
        return saved

    def is_served(self, server: Server, saved: str) -> bool:
        return True


def choose_sync(kind: Kind, problem: str | None, servers: list[Server]) -> WeightSync | None:
    """The way to lead these servers; UsageError where there is none, with the flags that they should have. `problem`:
    why the model does not travel as an adapter, if it does not."""
    if kind == "none":
        return None
    if kind == "lora" and problem is not None:
        raise UsageError(f"weight_sync lora: {problem}. Take weight_sync folder, by which all weights travel")
    ways: list[WeightSync] = [Adapter()] if problem is None and kind != "folder" else []
    ways += [] if kind == "lora" else [Workers(), Reload(), ByName()]
    for way in ways:
        if all(server.takes(way.path) for server in servers):
            return way
    raise UsageError(
        f"weight_sync {kind}: {servers[0].url} cannot be led so. `rlhf serve-vllm` starts a server that can; by hand: "
        f"{'; '.join(way.flags for way in ways)}. Or pass weight_sync none, and completions stay those of its own model"
    )


def adapter_problem(model: PreTrainedModel, folder: str | None) -> str | None:
    """Why the model, or the one that is in the folder, does not travel as an adapter; None if it does."""
    if (adapter := adapter_of(model)) is None:
        return None if folder is not None and base_of(folder, "models") else "the model is no adapter (use_peft)"
    config = adapter.model.peft_config[TRAINED]
    if config.use_dora or config.modules_to_save:
        return "vLLM serves no adapter with use_dora or lora_modules_to_save"
    return None


def names_in(answer: Any) -> list[Any]:
    """The names of a server's models."""
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise RequestError(f"expected a list of models, got {str(answer)[:EXCERPT]!r}", status=200)
    return [model.get("id") for model in models if isinstance(model, dict)]


def succeeded(answer: Any) -> None:
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise RequestError(f"expected success, got {str(answer)[:EXCERPT]!r}", status=200)
