"""Rollouts from an OpenAI-compatible HTTP server: vLLM, SGLang, transformers' own `serve`, and the like.

One request a completion, several at a time. What goes wrong on the way (no connection, no answer in time, an error of
the server's, an answer of another form) is tried again after a while, then reported for that prompt.

A server's log-probs should be those of the distribution that it draws from: vLLM returns those of the model before
temperature, top_k and top_p unless started with `--logprobs-mode processed_logprobs`. transformers' serve has none, and
it keeps every model that was requested: start it with a short `--model-timeout` where sync is by folder. Its draws are
the same on every run only at server_concurrency 1, as one state of the random numbers serves all requests.
"""

import json
import math
import random
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.checks import pad_id_of
from ..models.loading import save_model
from .generation import Completion, Sampling, up_to_end
from .http_json import EXCERPT, RequestError, Server
from .sampler import Failure, GenerationRequest


class ServerSampler:
    """A `Sampler` that sends a server one request a completion.

    `prompts`: "ids" sends token ids, asks for token ids, and knows the names that vLLM and SGLang have for what is
    beyond OpenAI's; "text" sends text, and, for transformers' serve, which draws nothing unless its model's
    generation_config says so, a generation_config. Where no ids come back, the text is encoded again.

    `sync_mode`: "none" leaves the server's model as it is; "folder" saves the policy, whose folder is then the model's
    name; "reload" saves it and has the server load it (SGLang's update_weights_from_disk). The server must see the
    folder under the same path.
    """

    def __init__(
        self,
        url: str,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: list[int],
        vocabulary: int,
        prompts: Literal["ids", "text"] = "ids",
        sync_mode: Literal["none", "folder", "reload"] = "none",
        timeout_s: float = 600.0,
        retries: int = 4,
        concurrency: int = 64,
        first_delay_s: float = 1.0,
    ) -> None:
        """ends: tokens after which nothing follows (`generation.end_ids`); vocabulary: tokens that the model has."""
        self.server = Server(url, timeout_s, retries, first_delay_s)
        self.model_name, self.tokenizer, self.ends, self.vocabulary = model_name, tokenizer, ends, vocabulary
        self.prompts, self.sync_mode, self.concurrency = prompts, sync_mode, concurrency
        self.has_worked = False

    def check(self) -> None:
        """UsageError, at once, where no such server answers."""
        without_retries = Server(self.server.url, min(self.server.timeout_s, 30.0), retries=0)
        try:
            without_retries.request("/v1/models", None, listed_models)
        except RequestError as problem:
            raise UsageError(
                f"server_url: no OpenAI-compatible server answers at {self.server.url}/v1/models: {problem}. Start it, "
                "or leave server_url out to generate in this process"
            ) from problem

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, seed: int, number: int
    ) -> list[Completion | Failure]:
        """A result for each request; UsageError where all are failures and the server never worked, or is gone."""

        def complete(position: int) -> Completion | Failure:
            draw = random.Random(f"{seed}, batch {number}, completion {position}").getrandbits(31)
            try:
                body = self._body(requests[position], sampling, draw)
                return self.server.request(
                    "/v1/completions", body, lambda answer: self._completion(answer, sampling, requests[position])
                )
            except RequestError as problem:
                return Failure(requests[position].where, str(problem))

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            results = list(pool.map(complete, range(len(requests))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for requests not yet made
        failed = all(isinstance(result, Failure) for result in results)
        if results and failed and not self.has_worked:
            raise UsageError(
                f"server_url: {self.server.url} gave no completion for any of {len(results)} prompts. The first, "
                f"{results[0].where}: {results[0].reason}. Check that it serves {self.model_name!r} (server_model), "
                f"and whether it takes prompts as {self.prompts} (server_prompts)"
            )
        if results and failed:  # these prompts may all be bad ones: of a group, they are even the same
            self.check()
        self.has_worked = self.has_worked or not failed
        return results

    def sync(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Has the server's next completions come from `model`, unless sync_mode is "none"."""
        self.tokenizer = tokenizer
        if self.sync_mode == "none":
            return
        # A new name each time: a server keeps what it once loaded under a name, also over our restarts.
        saved = folder.resolve() / f"policy-{uuid.uuid4().hex}"
        save_model(model, tokenizer, saved)
        if self.sync_mode == "folder":
            self.model_name = str(saved)
        else:
            try:
                self.server.request("/update_weights_from_disk", {"model_path": str(saved)}, updated)
            except RequestError as problem:
                raise UsageError(
                    f"server_sync: reload: {self.server.url}/update_weights_from_disk did not load {saved}: {problem}"
                ) from problem
        for old in folder.glob("policy-*"):  # that of the last sync, and what a killed run left
            if old.resolve() != saved:
                shutil.rmtree(old)

    def _body(self, request: GenerationRequest, sampling: Sampling, draw: int) -> dict[str, Any]:
        """The body of the POST. It names all that shapes the distribution: servers fill gaps from their own."""
        body = {
            "model": self.model_name, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": draw, "logprobs": 1,
        }  # fmt: skip
        if self.prompts == "ids":
            return body | {
                "prompt": request.ids, "top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0,
                "stop_token_ids": self.ends, "return_token_ids": True,
            }  # fmt: skip
        settings = {
            "do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "repetition_penalty": 1.0,
            "eos_token_id": self.ends or None, "pad_token_id": pad_id_of(self.tokenizer),
        }  # fmt: skip
        return body | {"prompt": self._text(request), "generation_config": json.dumps(settings)}

    def _text(self, request: GenerationRequest) -> str:
        """The text that tokenizers turn into request.ids; special tokens that they put in front are left out of it."""
        for candidate in (request.text, request.text.removeprefix(self.tokenizer.bos_token or "")):
            if self.tokenizer(candidate).input_ids == request.ids:
                return candidate
        raise RequestError(
            "a server would make other tokens of this prompt's text than the trainer does: pass server_prompts: ids",
            retryable=False,
        )

    def _completion(self, answer: Any, sampling: Sampling, request: GenerationRequest) -> Completion:
        """The completion in an answer, which may be anything."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            count = f"{len(choices)} choices" if isinstance(choices, list) else f"{str(answer)[:EXCERPT]!r}"
            raise RequestError(f"expected an answer with one choice, got {count}")
        choice = choices[0]
        if choice.get("finish_reason") not in ("stop", "length"):  # an aborted one is no completion of the policy's
            raise RequestError(
                f"expected finish_reason stop or length, got {repr(choice.get('finish_reason'))[:EXCERPT]}"
            )
        stopped = choice["finish_reason"] == "stop"
        ids = choice.get("token_ids")
        if ids is None:
            done = self._encoded(choice, stopped, request)
        elif isinstance(ids, list) and all(type(id) is int and 0 <= id < self.vocabulary for id in ids):
            done = up_to_end(ids, self.ends)
            done = done._replace(logprobs=numbers(choice, len(ids), len(done.ids)))
        else:
            raise RequestError(f"expected token_ids from 0 to {self.vocabulary - 1}, got {str(ids)[:EXCERPT]}")
        if stopped and not done.finished and self.tokenizer.eos_token_id is not None:
            done = Completion([*done.ids, self.tokenizer.eos_token_id], True)  # the server leaves the end itself out
        if len(done.ids) > sampling.max_new_tokens:  # text encoded again may have more tokens than it was drawn with
            done = Completion(done.ids[: sampling.max_new_tokens], False)
        if not done.ids:
            raise RequestError("the completion has no tokens, and did not end")
        return done

    def _encoded(self, choice: dict[str, Any], stopped: bool, request: GenerationRequest) -> Completion:
        """The tokens of a choice's text in its place, behind the prompt's, or by themselves where the two fuse. Its
        log-probs, if they are of these very tokens."""
        text = choice.get("text")
        if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
            # JSON can spell half of a character
            raise RequestError(f"expected a choice with text, got {str(choice)[:EXCERPT]!r}")
        before, whole, apart = (
            self.tokenizer(part, add_special_tokens=False).input_ids
            for part in (request.text, request.text + text, text)
        )
        ids = whole[len(before) :] if whole[: len(before)] == before else apart
        if stopped and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        done = up_to_end(ids, self.ends)
        theirs = choice["logprobs"].get("tokens") if isinstance(choice.get("logprobs"), dict) else None
        if theirs != [self.tokenizer.decode([id]) for id in done.ids]:
            return done
        return done._replace(logprobs=numbers(choice, len(ids), len(done.ids)))


def numbers(choice: dict[str, Any], count: int, kept: int) -> list[float] | None:
    """The first `kept` of a choice's log-probs if there is one for each of its `count` tokens, else None."""
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) != count:
        return None
    try:
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            return None
    except OverflowError as error:
        raise RequestError("expected log-probs, got a number too large for a float") from error
    return [float(value) for value in values[:kept]]


def listed_models(answer: Any) -> list[Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        raise RequestError(f"expected a list of models, got {str(answer)[:EXCERPT]!r}")
    return answer["data"]


def updated(answer: Any) -> None:
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise RequestError(f"expected success, got {str(answer)[:EXCERPT]!r}")
