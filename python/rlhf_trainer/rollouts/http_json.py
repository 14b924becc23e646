"""JSON over HTTP with a server that may be slow, down for a while, or talk rubbish: retried, then a RequestError."""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

Result = TypeVar("Result")
KEY_VARIABLE = "RLHF_SERVER_KEY"  # its value goes along as a bearer token, for servers started with a key
LONGEST_DELAY_S = 60.0  # of our own; a server may wish for more (Retry-After), up to:
LONGEST_WISH_S = 600.0
JITTER = 0.25  # a delay is up to so much longer, so that those who failed together do not come back together
READ_BYTES = 65536
EXCERPT = 300  # characters of a server's answer that a message repeats
ANSWER_BYTES, TOKEN_BYTES = 2**20, 2**12  # at most, of an answer and more for each token that may be in it


class RequestError(Exception):
    """A request without a usable answer. `retryable`: whether another try may have one; `status`: of HTTP, None where
    the server could not be reached; `delay_s`: how long the server wishes not to be tried again."""

    def __init__(self, reason: str, retryable: bool = True, *, status: int | None = None, delay_s: float = 0.0) -> None:
        super().__init__("".join(character if character.isprintable() else " " for character in reason))
        self.retryable, self.status, self.delay_s = retryable, status, delay_s


class LostConnection(RequestError):
    """The server was not reached, or hung up: it is down, or was started anew."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named, and for no other that it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """JSON to and from a server. `retries`: tries after the first one; `patience_s`: seconds for which a server that
    cannot be reached is tried again, however often; `key_variable`: the environment's variable that holds the key."""

    def __init__(
        self, url: str, timeout_s: float = 600.0, retries: int = 4, first_delay_s: float = 1.0, *,
        patience_s: float = 0.0, key_variable: str = KEY_VARIABLE,
    ) -> None:  # fmt: skip
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s, self.retries, self.first_delay_s = timeout_s, retries, first_delay_s
        self.patience_s, self.key_variable = patience_s, key_variable
        self.under_way = self.requests = self.failures = self.failures_in_a_row = 0
        self.lost_connections, self.seconds = 0, 0.0  # of all requests

    def request(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Result] | None = None) -> Result:
        return request_any([self], path, body, None if read is None else lambda answer, _: read(answer))

    def takes(self, path: str) -> bool:
        """Whether there is such a path to POST to: then a server refuses to GET it, and else it does not know it."""
        try:
            Server(self.url, self.timeout_s, self.retries).request(path, None)  # which counts as no failure
        except RequestError as problem:
            return problem.status == 405
        return True

    def count(self, started: float, problem: RequestError | None) -> None:
        """Notes the end of a try."""
        with _counting:
            self.under_way -= 1
            self.requests += 1
            self.failures += problem is not None
            self.failures_in_a_row = 0 if problem is None else self.failures_in_a_row + 1
            self.lost_connections += isinstance(problem, LostConnection)
            self.seconds += time.monotonic() - started

    @property
    def load(self) -> int:
        """What to balance: the requests under way and a next one, and twice as much for each failure in a row."""
        return (1 + self.under_way) << min(self.failures_in_a_row, 10)

    def _exchange(self, path: str, body: dict[str, Any] | None, is_json: bool) -> Any:
        headers, key = {"Content-Type": "application/json"}, key_in(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        most = ANSWER_BYTES + TOKEN_BYTES * (body or {}).get("max_tokens", 0) * (body or {}).get("n", 1)
        deadline = time.monotonic() + self.timeout_s
        try:
            request = urllib.request.Request(self.url + path, data=data, headers=headers)
            with urllib.request.build_opener(NoRedirects).open(request, timeout=self.timeout_s) as response:
                answer = without(key, self._read(response, deadline, most))
        except urllib.error.HTTPError as error:
            retryable = error.code >= 500 or error.code in (408, 429)
            advice = ". Redirects are not followed: name the server itself" if 300 <= error.code < 400 else ""
            reason, delay_s = f"HTTP {error.code}: {excerpt_of(error, key)}", wish_of(error.headers.get("Retry-After"))
            raise RequestError(reason + advice, retryable, status=error.code, delay_s=delay_s) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: of a host's name
            cause = getattr(error, "reason", error)  # URLError wraps what happened while connecting
            if isinstance(cause, TimeoutError):
                raise RequestError(f"no answer within {self.timeout_s:g} seconds", status=408) from error
            raise LostConnection(
                f"{type(cause).__name__}: {without(key, str(cause).encode(errors='replace')).decode()}"
            ) from error
        try:
            return json.loads(answer) if is_json else None
        except (ValueError, RecursionError) as error:
            reason = f"the answer is not JSON: {answer[:EXCERPT].decode(errors='replace')!r}"
            raise RequestError(reason, status=200) from error

    def _read(self, response: http.client.HTTPResponse, deadline: float, most: int) -> bytes:
        """The whole answer, by the deadline: a socket's timeout starts anew with every byte that drips in."""
        parts, size = [], 0
        while part := response.read1(READ_BYTES):
            parts.append(part)
            size += len(part)
            if size > most:
                reason = f"the answer has more than the {most} bytes that such a request may have"
                raise RequestError(reason, status=200)
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)


_counting = threading.Lock()


def request_any(
    servers: Sequence[Server], path: str, body: dict[str, Any] | None, read: Callable[[Any, Server], Result] | None
) -> Result:
    """`read(answer, server)` of POST body, or of GET without one, to that of equal servers which has the least to do,
    with another try after 1, 2, 4, ... times first_delay_s, or when the server wishes; RequestError where no try has
    an answer that `read` takes. Without `read` it may be anything, and is not returned."""
    retry, started = 0, time.monotonic()
    while True:
        with _counting:
            server = min(servers, key=lambda server: (server.load, server.requests))
            server.under_way += 1
        now = time.monotonic()
        try:
            answer = server._exchange(path, body, is_json=read is not None)
            result = None if read is None else read(answer, server)
            server.count(now, None)
            return result
        except RequestError as problem:
            server.count(now, problem)
            left_s = server.patience_s - (time.monotonic() - started)
            is_last = retry >= server.retries and not (isinstance(problem, LostConnection) and left_s > 0)
            if not problem.retryable or is_last:
                tries = "" if retry == 0 else f" (at the last of {retry + 1} tries)"
                raise type(problem)(f"{problem}{tries}", problem.retryable, status=problem.status) from None
            delay_s = max(min(server.first_delay_s * 2**retry, LONGEST_DELAY_S), min(problem.delay_s, LONGEST_WISH_S))
            if retry >= server.retries:
                delay_s = min(delay_s, max(left_s, server.first_delay_s))
        time.sleep(delay_s * random.uniform(1.0, 1.0 + JITTER))
        retry += 1


def key_in(variable: str) -> str:
    """The value of the environment's variable, which files and shells like to end with a new line; RequestError, which
    does not show it, where no header can hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RequestError(f"{variable} must be one line of ASCII characters, and is not", retryable=False)
    return key


def without(key: str, content: bytes) -> bytes:
    """What a server says, but for the key, should it repeat that."""
    return content.replace(key.encode(), b"(the key)") if key else content


def excerpt_of(error: urllib.error.HTTPError, key: str) -> str:
    """The start of an HTTP error's text, or its reason where the text cannot be read."""
    reason = without(key, str(error.reason).encode(errors="replace"))
    try:
        content = without(key, error.read1(EXCERPT + len(key)))
    except (OSError, http.client.HTTPException):
        content = b""
    return (content[:EXCERPT].strip() or reason).decode(errors="replace")


def wish_of(retry_after: str | None) -> float:
    """The seconds of a Retry-After header, which has a number of them or a date; 0 where it has neither."""
    with suppress(ValueError):
        return max(0.0, float(retry_after or 0))  # 0 of NaN, too
    with suppress(ValueError, TypeError):  # no date; one without a zone
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    return 0.0
