"""Real gateways over HTTP, a real engine process behind them, and rows as the agent would write them."""

import base64
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from hscr.engine import EngineClient
from hscr.records import AdapterVersion, Answer, Replica, Role, now
from hscr.store.releases import add_adapter
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from hscr.store.tables import gateways
from service.app import create_app
from service.settings import GatewaySettings
from tests.engine.conftest import Running, png, save_adapter, start
from tests.tiny_llava import build
from tests.waiting import wait_until

FOREVER = 86_400.0
VERSIONS = {"hscr@aaaaaaaaaaaa": 1, "hscr@bbbbbbbbbbbb": 2}
"""Adapter versions the engine has loaded, by the seed of their weights."""

QUESTION = "is there a nodule in the left lung?"
IMAGE = png(0)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("service") / "tiny")


@pytest.fixture(scope="session")
def engine(model_folder, tmp_path_factory) -> Iterator[Running]:
    """An engine with both versions loaded, as an agent would have done it."""
    from asyncio import run

    from hscr.models.vlm import VLM

    vlm = VLM.load(model_folder)
    folders = {
        name: save_adapter(vlm, tmp_path_factory.mktemp("adapters") / str(seed), seed=seed)
        for name, seed in VERSIONS.items()
    }

    async def load(address: str) -> None:
        async with EngineClient(address) as client:
            for name, folder in folders.items():
                await client.load_adapter(name, folder)

    with start(model_folder, "--served-model-name", "tiny") as running:
        run(load(running.address))
        yield running


def replica(address: str, name: str = "engine-0", **changes: Any) -> Replica:
    given = {
        "id": name,
        "address": address,
        "model": "tiny",
        "model_digest": "m" * 64,
        "engine": "embedded/0.1.0",
        "numeric_mode": "cpu/float32",
        "template_digest": "t" * 64,
        "intended_use": "Tests of this project.",
        "loaded": tuple(VERSIONS),
        "ready": True,
        "seen_at": now(),
    }
    return Replica.model_validate(given | changes)


def adapter(name: str) -> AdapterVersion:
    digest = name.partition("@")[2] + "0" * 52
    return AdapterVersion(
        name=name,
        digest=digest,
        base_digest="m" * 64,
        job_id="job_x",
        config={},
        records=0,
        records_digest="r",
    )


Event = tuple[str, str, str]
"""An event's type, data and id."""


def events_of(lines: Iterable[str]) -> Iterator[Event]:
    """Parse server-sent events; each is given as soon as it is whole."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield fields.get("event", "message"), fields["data"], fields.get("id", "")
            fields = {}


def chat_body(url: str | None = None, **fields: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": url or f"data:image/png;base64,{b64(IMAGE)}"}}
    content = [image, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return {"model": "active", "max_tokens": 8, "messages": messages} | fields


@cache
def documented() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """OpenAPI's operations by a pattern of their paths."""
    paths = create_app(GatewaySettings()).openapi()["paths"]
    return [(re.compile(re.sub(r"{[^}]+}", "[^/]+", path)), operations) for path, operations in paths.items()]


def check_documented(method: str, path: str, reply: httpx2.Response) -> None:
    """Every reply of every test has a status and a media type that its route documents."""
    if path == "/openapi.json":
        return
    found = [operations for pattern, operations in documented() if pattern.fullmatch(path)]
    operation = next((each[method.lower()] for each in found if method.lower() in each), None)
    if operation is None:
        assert reply.status_code in {404, 405}, reply.text
        return
    assert str(reply.status_code) in operation["responses"], (method, path, reply.status_code, reply.text)
    media_type = reply.headers["content-type"].partition(";")[0]
    assert media_type in operation["responses"][str(reply.status_code)]["content"]


@dataclass
class Gateway:
    """A serving gateway and the store behind it."""

    url: str
    store: Store
    settings: GatewaySettings
    client: httpx2.Client

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        reply = self.client.request(method, path, **options)
        check_documented(method, path, reply)
        return reply

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx2.Response:
        return self.request("POST", path, json=json, **options)

    def ask(self, question: str = QUESTION, image: bytes = IMAGE, **body: Any) -> httpx2.Response:
        headers = body.pop("headers", None)
        body = {"image": b64(image), "question": question, "sampling": {"max_tokens": 8}} | body
        return self.post("/v1/vqa", body, headers=headers)

    def answered(self, **body: Any) -> Answer:
        """An answer as the store kept it."""
        reply = self.ask(**body)
        assert reply.status_code == 200, reply.text
        return self.store.answers.get(reply.json()["id"])

    def key(self, role: Role, **policy: Any) -> dict[str, str]:
        """Headers with a new key."""
        return {"Authorization": f"Bearer {self.store.keys.create(role, role, **policy)[1]}"}

    @contextmanager
    def stream(self, path: str, body: dict[str, Any], **options: Any) -> Iterator[Iterator[Event]]:
        """The events of a streamed answer, as they come."""
        method = options.pop("method", "POST")
        sent = {"json": {"stream": True} | body} if method == "POST" else {}
        with self.client.stream(method, path, **sent, **options) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield events_of(response.iter_lines())

    def metric(self, name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("/metrics").text.splitlines() if line[0] != "#"]
        samples = [line.rsplit(" ", 1) for line in lines]
        return sum(float(v) for k, v in samples if k.split("{")[0] == name and all(w in k for w in wanted))

    def epoch_seen(self) -> None:
        """Wait until the gateway has seen the pointer as it is now."""
        epoch = self.store.releases.pointer().epoch
        wait_until(lambda: self.metric("hscr_pointer_epoch") == epoch, what="the pointer's epoch")

    def serve_version(self, version: str | None) -> None:
        self.store.releases.promote(
            version, actor="test", reason="test", override=True, replicas_seen=timedelta(seconds=FOREVER)
        )
        self.epoch_seen()


@contextmanager
def standing_still(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Alive and silent, so that what it does cannot end meanwhile."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def serving(settings: StoreSettings, store: Store, **options: Any) -> Iterator[Gateway]:
    """A gateway in a thread, on a free port, over real HTTP."""
    given = {"home": settings.home, "pointer_poll": 0.02, "event_poll": 0.02, "replicas_seen": FOREVER}
    chosen = GatewaySettings.model_validate(given | options)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(chosen), port=0, loop="uvloop", http="httptools", log_config=None, access_log=False
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), what="the gateway's start")
        assert thread.is_alive(), "the gateway did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=address, timeout=30, verify=False) as client:
            yield Gateway(address, store, chosen, client)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def serve(settings: StoreSettings, store: Store) -> Iterator[Callable[..., Gateway]]:
    """`serve(**settings)` starts a gateway on this test's own store."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(settings, store, **options))


@pytest.fixture
def gateway(serve: Callable[..., Gateway], store: Store, engine: Running) -> Gateway:
    """A gateway with one replica and two known versions; the base model is active."""
    equip(store, engine)
    return serve()


def idle(store: Store, version: str) -> bool:
    """Whether every copy's heartbeat names the present epoch and nothing in flight on the version."""
    epoch = store.releases.pointer().epoch
    with store.database.read() as connection:
        copies = connection.execute(gateways.select()).all()
    return all(copy.epoch == epoch and version not in copy.in_flight for copy in copies)


def equip(store: Store, engine: Running) -> None:
    with store.database.write() as connection:
        for name in VERSIONS:
            add_adapter(connection, adapter(name), [])
    store.releases.report_replica(replica(engine.address))
