"""JSON over HTTP with a server that may be slow, down for a while, or talk rubbish: retried, then a RequestError."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
KEY_VARIABLE = "RLHF_SERVER_KEY"  # its value goes along as a bearer token, for servers started with a key
LONGEST_DELAY_S = 60.0
READ_BYTES = 65536
EXCERPT = 300  # characters of a server's answer that a message repeats


class RequestError(Exception):
    """A request without a usable answer; `retryable`: whether another try may have one."""

    def __init__(self, reason: str, retryable: bool = True) -> None:
        super().__init__(reason)
        self.retryable = retryable


class Server:
    """JSON to and from a server, with another try after 1, 2, 4, ... times first_delay_s."""

    def __init__(self, url: str, timeout_s: float, retries: int, first_delay_s: float = 1.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s, self.retries, self.first_delay_s = timeout_s, retries, first_delay_s

    def request(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Result]) -> Result:
        """`read(answer)` of POST body, or of GET without one; RequestError where no try has an answer that `read`
        takes."""
        retry = 0
        while True:
            try:
                return read(self._exchange(path, body))
            except RequestError as problem:
                if not problem.retryable or retry == self.retries:
                    tries = "" if retry == 0 else f" (at the last of {retry + 1} tries)"
                    raise RequestError(f"{problem}{tries}", problem.retryable) from problem
            time.sleep(min(self.first_delay_s * 2**retry, LONGEST_DELAY_S))
            retry += 1

    def _exchange(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + self.timeout_s
        try:
            request = urllib.request.Request(self.url + path, data=data, headers=headers)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                answer = self._read(response, deadline)
        except urllib.error.HTTPError as error:
            retryable = error.code >= 500 or error.code in (408, 429)
            raise RequestError(f"HTTP {error.code}: {excerpt_of(error)}", retryable) from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # URLError wraps what happened while connecting
            if isinstance(cause, TimeoutError):
                raise RequestError(f"no answer within {self.timeout_s:g} seconds") from error
            raise RequestError(f"{type(cause).__name__}: {cause}") from error
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the answer is not JSON: {answer[:EXCERPT].decode(errors='replace')!r}") from error

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole answer, by the deadline: a socket's timeout starts anew with every byte that drips in."""
        parts = []
        while part := response.read1(READ_BYTES):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)


def excerpt_of(error: urllib.error.HTTPError) -> str:
    """The start of an HTTP error's text, or its reason where the text cannot be read."""
    try:
        return error.read1(EXCERPT).decode(errors="replace").strip() or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
