"""A small chat server on a free local port that does what a test tells it, faults included."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server sends back: a chat completion that says ``text``, or ``body`` as it is."""

    text: str = "fine\n3"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    after_seconds: float = 0.0
    content_type: str = "application/json"

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "type": "error", "code": None}}).encode()
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(whole).encode()


@dataclass
class ChatServer:
    """A running server: what came in, and where it listens."""

    base_url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests, in the order in which they came."""
    times: list[float] = field(default_factory=list)
    """When they came, in seconds of the monotonic clock."""
    keys: list[str] = field(default_factory=list)
    """Their Authorization headers."""

    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.asked]


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Answer]) -> Iterator[ChatServer]:
    """Serve chat completions: ``answer`` gets the number of the request, from 0, and its body."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(server.asked)
                server.asked.append(body)
                server.times.append(time.monotonic())
                server.keys.append(self.headers["authorization"])
            reply = answer(number, body)
            time.sleep(reply.after_seconds)
            payload = reply.payload()
            self.send_response(reply.status)
            for name, value in ({"content-type": reply.content_type, "content-length": str(len(payload))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    class Listener(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client that gives up breaks the connection."""

    listener = Listener(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{listener.server_port}/v1")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
