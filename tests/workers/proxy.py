"""Between an agent and its engine: keeps account of the calls, and holds one until the test lets it go."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

LOAD, UNLOAD, CHAT = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"
_PATIENCE = 120.0


class Call(NamedTuple):
    path: str
    version: str | None
    """the adapter or model that the call is about"""


@dataclass
class Hold:
    """A call that is stopped before it reaches the engine, or its answer before it reaches the agent."""

    call: Call
    answered: bool
    sent: threading.Event = field(default_factory=threading.Event)
    """set when the engine's machine has the call"""
    _here: threading.Event = field(default_factory=threading.Event)
    _go: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float = 60) -> None:
        """Until the call is stopped."""
        assert self._here.wait(seconds), f"{self.call} never came"

    def let_go(self) -> None:
        self._go.set()

    def stop(self) -> None:
        self._here.set()
        self._go.wait(_PATIENCE)


class Proxy(ThreadingHTTPServer):
    """Start with `with Proxy(engine.url) as proxy:`. A dead engine is a dead connection here, too."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.target = urlsplit(target).netloc
        self.calls: list[Call] = []
        self._holds: list[Hold] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @contextmanager
    def hold(self, path: str, version: str, *, answered: bool = False) -> Iterator[Hold]:
        """Stop the first such call, before the engine sees it or once it has answered, within the block."""
        hold = Hold(Call(path, version), answered)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.let_go()

    def loads(self) -> list[str | None]:
        """Names of the adapters that the engine was asked to load."""
        return [call.version for call in self.calls if call.path == LOAD]

    def stop_held(self, call: Call, *, answered: bool) -> None:
        for hold in self.holds(call):
            if hold.answered == answered:
                hold.stop()

    def holds(self, call: Call) -> list[Hold]:
        return [hold for hold in self._holds if hold.call == call]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def log_message(self, *_: Any) -> None:
        """Nothing: `Proxy.calls` tells."""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if body else {}
        call = Call(self.path, asked.get("lora_name") or asked.get("model"))
        self.server.calls.append(call)
        self.server.stop_held(call, answered=False)
        try:
            engine = HTTPConnection(self.server.target, timeout=_PATIENCE)
            engine.request(self.command, self.path, body, {"Content-Type": "application/json"})
            for hold in self.server.holds(call):
                hold.sent.set()
            reply = engine.getresponse()
            data = reply.read()
        except (OSError, HTTPException):
            self.close_connection = True
            return
        self.server.stop_held(call, answered=True)
        try:
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the agent was killed meanwhile
            self.close_connection = True
