"""A W&B server on this machine: as much of GraphQL and of the file stream as W&B's client needs for metrics."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}


class WandbServer:
    """Keeps the rows of one run. ``answers = False`` makes it take requests and never answer, as a lost connection does."""

    def __init__(self) -> None:
        self.answers = True
        self.lines: list[str] = []
        self.summary = "{}"
        self.received: list[bytes] = []
        """Every body, for what must not be in any."""
        self._wake = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The run's rows."""
        return [json.loads(line) for line in self.lines]

    def answer(self, path: str, body: bytes) -> Any:
        """What the server says to a request."""
        self.received.append(body)
        if not self.answers:
            self._wake.wait(60)
        if path.startswith("/graphql"):
            return {"data": self._data(json.loads(body))}
        if "file_stream" in path:
            for name, chunk in (json.loads(body).get("files") or {}).items():
                if "history" in name:
                    self.lines[chunk["offset"] :] = chunk["content"]
                elif "summary" in name:
                    self.summary = chunk["content"][-1]
            return {"exitcode": None, "limits": {}}
        return {}

    def _data(self, request: dict[str, Any]) -> Any:
        name, variables = request.get("operationName"), request.get("variables") or {}
        if name == "UpsertBucket":
            bucket = {"id": "x", "name": variables.get("name"), "displayName": "run", "config": "{}", "sweepName": None, "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(self.lines)}, "inserted": not self.lines}}
        if name == "RunResumeStatus":
            return {"model": PROJECT | {"bucket": self._bucket(variables["name"]) if self.lines else None}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        return {"serverInfo": None, "viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}

    def _bucket(self, name: str) -> dict[str, Any]:
        counts = {"logLineCount": 0, "historyLineCount": len(self.lines), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps(self.lines[-1:]), "eventsTail": "[]", "summaryMetrics": self.summary}
        return {"id": "x", "name": name, "displayName": "run", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}', **counts, **tails}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            content = json.dumps(server.answer(self.path, body)).encode()
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has given up
                self.close_connection = True

        do_GET = do_PUT = do_POST

    return Handler
