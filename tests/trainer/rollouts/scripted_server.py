"""A server on loopback that answers as a test scripts it."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VLLM = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/pause?mode=abort", "/resume",
        "/reset_prefix_cache")  # fmt: skip


class Scripted:
    """Answers POST and GET as `answer(path, body)` says, and keeps the requests.

    The answer: (status, JSON or bytes), or bytes that are sent as they are, without so much as a status line.
    """

    def __init__(self):
        self.requests, self.keys, self.answer, self.lock = [], [], None, threading.Lock()
        self.over = threading.Event()

    @contextmanager
    def running(self):
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(body) if body else None
                with script.lock:
                    script.requests.append((self.path, body))
                    script.keys.append(self.headers.get("Authorization"))
                answer = script.answer(self.path, body)
                with suppress(ConnectionError):  # the client did not wait for it
                    if isinstance(answer, bytes):
                        self.wfile.write(answer)
                    else:
                        self.send(*answer)

            def send(self, status, content):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self.over.set()
            server.shutdown()
            thread.join()
            server.server_close()


def choice(**fields):
    """An answer of /v1/completions, of the shape that vLLM gives it."""
    return choices([fields])


def choices(several):
    empty = {"text": "", "finish_reason": "length", "logprobs": None}
    return 200, {"choices": [{"index": i} | empty | fields for i, fields in enumerate(several)]}


class Led(Scripted):
    """A server that takes POSTs to `paths`, and says of each completion which weights drew it: token 10 + their number.

    `calls`: what weights were sent by; `fails`: the paths that refuse.
    """

    def __init__(self, *paths):
        super().__init__()
        self.paths, self.models, self.calls, self.fails = paths, ["base"], [], set()
        self.weights, self.restart_at, self.drawn = 0, set(), 0
        self.answer = self.reply

    def restart(self):
        """Its own weights, no adapter; whoever waits for an answer waits in vain."""
        self.models, self.weights = ["base"], 0
        return b""

    def reply(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/v1/completions":
            self.drawn += 1
            if self.drawn in self.restart_at:
                return self.restart()
            if body["model"] not in self.models:
                return 404, b"no such model"
            return choices([{"token_ids": [10 + self.weights]}] * body["n"])
        if body is None:
            return (405 if path in self.paths else 404), b""
        self.calls.append((path.strip("/"), body))
        if path in self.fails:
            return 400, b"it does not fit"
        if path == "/v1/load_lora_adapter":
            self.models.append(body["lora_name"])
        if path == "/v1/unload_lora_adapter":
            self.models.remove(body["lora_name"])
        if "lora_path" in body or "kwargs" in body or "model_path" in body:
            self.weights += 1
        return 200, {"success": True}
