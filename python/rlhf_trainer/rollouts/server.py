"""Rollouts from OpenAI-compatible HTTP servers: vLLM, SGLang, transformers' own `serve`, and the like.

One request for all completions of a prompt, so that a server computes the prompt once; several requests at a time, each
to the server that has the least to do. What goes wrong on the way (no connection, no answer in time, an error of the
server's, an answer of another form) is tried again after a while, then reported for that prompt.

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
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import compress, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UNREADABLE, UsageError
from ..models.checks import pad_id_of
from .generation import Completion, Sampling, up_to_end
from .http_json import EXCERPT, RequestError, Server, request_any
from .sampler import Failure, GenerationRequest
from .weight_sync import WeightSync, names_in

RESTARTS = 3  # of servers within one call of `generate`
Drawn = tuple[list[Completion | Failure], Server | None]  # what came of a group, and of which server


class Group(NamedTuple):
    """Equal requests that follow each other, and the place of the first."""

    place: int
    requests: list[GenerationRequest]


class Probe(NamedTuple):
    """A server's own view of a prompt: its tokens, the log-probs of all but the first, and whether the log-probs of
    what it draws are of the distribution that it draws from."""

    ids: list[int]
    logprobs: list[float]
    is_processed: bool


class ServerSampler:
    """A `Sampler` that sends servers one request a prompt. All of them have the same model.

    `prompts`: "ids" sends token ids, asks for token ids, and knows the names that vLLM and SGLang have for what is
    beyond OpenAI's; "text" sends text, a request a completion, and, for transformers' serve, which draws nothing unless
    its model's generation_config says so, a generation_config. Where no ids come back, the text is encoded again.
    """

    def __init__(
        self, servers: Sequence[Server], model_name: str, tokenizer: PreTrainedTokenizerBase, *, ends: list[int],
        vocabulary: int, prompts: Literal["ids", "text"] = "ids", concurrency: int = 64, way: WeightSync | None = None,
    ) -> None:  # fmt: skip
        """ends: tokens after which nothing follows (`generation.end_ids`); vocabulary: tokens that the model has;
        way: how servers come by the policy's weights, None if their models stay as they are."""
        self.servers = servers
        self.model_name, self.tokenizer, self.ends, self.vocabulary = model_name, tokenizer, ends, vocabulary
        self.prompts, self.concurrency, self.way = prompts, concurrency, way
        self.saved = ""  # the copy of the policy that they serve
        self.copies: list[Path] = []  # that were saved, and that one
        self.has_worked = self.is_stopped = False

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, seed: int, number: int
    ) -> list[Completion | Failure]:
        """A result for each request; UsageError where all are failures and the servers never worked, or are gone.

        What a server drew that lost the policy's weights meanwhile, as it was restarted, is drawn again.
        """
        open_groups, place, results = [], 0, dict[int, list[Completion | Failure]]()
        for _, equal in groupby(requests, key=lambda request: request.ids if self.prompts == "ids" else object()):
            open_groups.append(Group(place, list(equal)))
            place += len(open_groups[-1].requests)
        for _ in range(RESTARTS):
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                drawn = list(pool.map(lambda group: self._draw(group, sampling, seed, number), open_groups))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # an interruption waits for no request not yet made
            results |= {group.place: part for group, (part, _) in zip(open_groups, drawn, strict=True)}
            restarted = self._restarted()
            if not restarted:
                break
            lost = [server is None or server in restarted for _, server in drawn]
            open_groups = list(compress(open_groups, lost))
            urls = ", ".join(server.url for server in restarted)
            tqdm.write(f"{urls}: started anew; gets the policy again, and {len(open_groups)} prompts are drawn again")
            self._send(restarted)
        else:
            raise UsageError(f"{urls}: started anew {RESTARTS} times within {len(requests)} completions; see its log")
        return self._judged([result for place in sorted(results) for result in results[place]])

    def stop(self) -> None:
        """Ends a `generate` of another thread at the next request: it raises CancelledError."""
        self.is_stopped = True

    def _draw(self, group: Group, sampling: Sampling, seed: int, number: int) -> Drawn:
        if self.is_stopped:
            raise CancelledError
        first, count = group.requests[0], len(group.requests)
        draw = random.Random(f"{seed}, batch {number}, completion {group.place}").getrandbits(31)

        def read(answer: Any, server: Server) -> Drawn:
            return [self._completion(c, sampling, first) for c in self._choices(answer, count)], server

        try:
            body = self._body(first, sampling, draw, count)
            return request_any(self.servers, "/v1/completions", body, read)
        except RequestError as problem:
            return [Failure(request.where, str(problem)) for request in group.requests], None

    def _restarted(self) -> list[Server]:
        """The servers that do not serve the policy any more."""
        if self.way is None or not self.saved:
            return []
        try:
            return [server for server in self.servers if not self.way.is_served(server, self.saved)]
        except RequestError:
            check_servers(self.servers)
            raise

    def _judged(self, results: list[Completion | Failure]) -> list[Completion | Failure]:
        failed = all(isinstance(result, Failure) for result in results)
        if results and failed and not self.has_worked:
            urls = ", ".join(server.url for server in self.servers)
            raise UsageError(
                f"vllm_server_base_url: {urls} gave no completion for any of {len(results)} prompts. The first, "
                f"{results[0].where}: {results[0].reason}. Check that it serves {self.model_name!r} (server_model), "
                f"and whether it takes prompts as {self.prompts} (server_prompts)"
            )
        if results and failed:  # these prompts may all be bad ones: of a group, they are even the same
            check_servers(self.servers)
        self.has_worked = self.has_worked or not failed
        return results

    def sync(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Has the servers' next completions come from `model`, unless they are not led."""
        self.load(self.save(model, tokenizer, folder))

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
        """Writes a copy of `model` to be loaded later, maybe by another thread, into `folder`, which is this method's;
        returns its name, "" where servers are not led."""
        self.tokenizer = tokenizer
        if self.way is None:
            return ""
        if not self.copies:  # what a killed run left
            shutil.rmtree(folder, ignore_errors=True)
        # A new name each time: a server keeps what it once loaded under a name, also over our restarts.
        saved = folder.resolve() / f"policy-{uuid.uuid4().hex}"
        self.way.save(model, tokenizer, saved)
        self.copies.append(saved)
        return str(saved)

    def load(self, saved: str) -> None:
        """Has the servers' next completions come from the model in a folder that they see; earlier copies go."""
        if self.way is None:
            return
        before, self.saved = self.saved, saved
        self._send(self.servers)
        self.model_name = self.way.name(saved, self.model_name)
        for server in self.servers if before else ():
            self.way.drop(server, before)
        while Path(saved) in self.copies[1:]:
            shutil.rmtree(self.copies.pop(0))

    def _send(self, servers: Sequence[Server]) -> None:
        try:
            with ThreadPoolExecutor(len(servers)) as pool:
                list(pool.map(lambda server: self.way.send(server, self.saved), servers))
        except RequestError as problem:
            raise UsageError(
                f"weight_sync: {', '.join(server.url for server in servers)} did not take the policy in {self.saved}, "
                f"which must be there under this path, too: {problem}"
            ) from problem

    def probe(self, request: GenerationRequest, server: Server) -> Probe:
        """What the server makes of a prompt's text; RequestError where it does not say."""
        if self.prompts == "text":
            raise RequestError("it takes text alone")
        one = self._body(request, Sampling(1, top_k=1), 0, 1)

        def read(answer: Any) -> Probe:
            choice = self._choices(answer, 1)[0]
            ids, rows, drawn = choice.get("prompt_token_ids"), choice.get("prompt_logprobs"), numbers(choice, 1, 1)
            try:
                logprobs = [float(row[str(id)]["logprob"]) for id, row in zip(ids[1:], rows[1:], strict=True)]
            except UNREADABLE as error:
                raise RequestError("it scores no prompts", retryable=False) from error
            return Probe(ids, logprobs, drawn is not None and drawn[0] > -1e-4)  # of all that top_k leaves, 1 is drawn

        body = one | {"prompt": self._text(request), "prompt_logprobs": 0}
        return server.request("/v1/completions", body, read)

    def metrics(self) -> dict[str, float]:
        """How the servers do, since the run began."""
        return {
            f"rollouts/server_{number}/{name}": float(value)
            for number, server in enumerate(self.servers)
            for name, value in (
                ("requests", server.requests), ("failures", server.failures),
                ("mean_seconds", server.seconds / max(1, server.requests)),
            )
        }  # fmt: skip

    def _body(self, request: GenerationRequest, sampling: Sampling, draw: int, count: int) -> dict[str, Any]:
        """The body of the POST. It names all that shapes the distribution: servers fill gaps from their own."""
        body = {
            "model": self.model_name, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": draw, "logprobs": 1,
        }  # fmt: skip
        if self.prompts == "ids":
            return body | {
                "prompt": request.ids, "top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0,
                "stop_token_ids": self.ends, "return_token_ids": True, "n": count,
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

    def _choices(self, answer: Any, count: int) -> list[dict[str, Any]]:
        """The choices in an answer, which may be anything, in their order."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != count or not all(isinstance(c, dict) for c in choices):
            got = f"{len(choices)} choices" if isinstance(choices, list) else f"{str(answer)[:EXCERPT]!r}"
            noun = "one choice" if count == 1 else f"{count} choices"
            raise RequestError(f"expected an answer with {noun}, got {got}")
        ordered = [next((choice for choice in choices if choice.get("index") == i), None) for i in range(count)]
        return choices if None in ordered else ordered

    def _completion(self, choice: dict[str, Any], sampling: Sampling, request: GenerationRequest) -> Completion:
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


def check_servers(servers: Sequence[Server], patience_s: float = 0.0) -> list[Any]:
    """The names of their models; UsageError where no OpenAI-compatible server answers within patience_s."""
    for server in servers:
        once = Server(server.url, min(server.timeout_s, 30.0), 0, patience_s=patience_s)
        try:
            names = once.request("/v1/models", None, names_in)
        except RequestError as problem:
            raise UsageError(
                f"vllm_server_base_url: no OpenAI-compatible server answers at {server.url}/v1/models: {problem}. "
                "Start it (rlhf serve-vllm), or leave use_vllm out to generate in this process"
            ) from problem
    return names


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
