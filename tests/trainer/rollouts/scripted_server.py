"""A server on loopback that answers as a test scripts it."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
    return 200, {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": None} | fields]}
