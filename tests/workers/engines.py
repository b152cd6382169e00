"""A real engine with its agent, and versions for them to serve."""

import asyncio
import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from hscr.config import FinetuneConfig
from hscr.engine import ChatRequest, EngineClient
from hscr.learn.probe import probe_adapter
from hscr.models.digest import model_digest
from hscr.models.vlm import VLM
from hscr.records import AdapterVersion, PreferenceRecord, Replica, Response
from hscr.store.blobs import bytes_digest
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.harness import Processes, png
from workers.settings import EMBEDDED_MODEL

SEEN = timedelta(seconds=5)
PICTURES = tuple(png(seed) for seed in range(1, 7))


class Engine:
    """An embedded engine on a fixed port, so that it can come back after its death."""

    def __init__(self, model: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = ["service.embedded", "--model", str(model), "--port", str(port), "--threads", "1"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", *self._command, "--served-model-name", "base"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: self._ask("health"), seconds=120, what="the engine")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Alive and silent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def adapters(self) -> set[str]:
        return {model.id for model in self._ask("models") if model.parent}

    def load(self, name: str, folder: Path) -> None:
        self._ask("load_adapter", name, folder)

    def unload(self, name: str) -> None:
        self._ask("unload_adapter", name)

    def answer(self, model: str) -> str:
        request = ChatRequest.ask(model, "what is this?", png(1))
        return str(self._ask("chat", request).text)

    def _ask(self, method: str, *arguments: Any) -> Any:
        async def ask() -> Any:
            async with EngineClient(self.url) as client:
                return await getattr(client, method)(*arguments)

        return asyncio.run(ask())


def probe(model: Path, folder: Path) -> dict[str, Any]:
    """The probe that the trainer would have stored."""
    vlm = VLM.load(model)
    vlm.load_adapter(folder, "probed")
    pairs = [(_record(picture), Image.open(io.BytesIO(picture))) for picture in PICTURES]
    return probe_adapter(vlm, "probed", pairs)


def _record(picture: bytes) -> PreferenceRecord:
    digest = bytes_digest(picture)
    return PreferenceRecord(
        id=f"pref_{digest}", image_digest=digest, study="s", question="what is this?", chosen="no.",
        rejected=(Response(text="no.", similarity=0.1, mean_probability=0.1),), source="s", method="hscr",
        model_digest="m", config_digest="c", consent=True,
    )  # fmt: skip


def register(store: Store, model: Path, folder: Path, probe: dict[str, Any]) -> AdapterVersion:
    for picture in PICTURES:
        store.blobs.put(picture)
    digest = store.blobs.put_folder(folder)
    version = AdapterVersion(
        name=f"hscr@{digest[:12]}", digest=digest, base_digest=model_digest(model), job_id="job_1",
        config=FinetuneConfig().resolved(), records=8, records_digest="r", probe=probe,
    )  # fmt: skip
    with store.database.write() as connection:
        add_adapter(connection, version, [])
    return version


def start_agent(
    processes: Processes, engine: Engine, *, url: str | None = None, name: str = "one", **environment: str
) -> subprocess.Popen[bytes]:
    """The agent called `name`, which reaches the engine at `url` if that is not the engine's own."""
    return processes.start(
        "workers.agent",
        HSCR_ENGINE_URL=url or engine.url,
        HSCR_REPLICA_ID=name,
        HSCR_MODEL_PATH=str(EMBEDDED_MODEL),
        HSCR_RETRY_SECONDS="0.5",
        HSCR_UNLOAD_GRACE_SECONDS="0.2",
        **environment,
    )


def replica(store: Store) -> Replica | None:
    live = store.releases.replicas(seen_within=SEEN)
    return live[0] if live else None


def loaded(store: Store) -> tuple[str, ...]:
    present = replica(store)
    return present.loaded if present else ()
