"""A real engine with its agent, and versions for them to serve."""

import io
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from hscr.config import FinetuneConfig
from hscr.engine import ChatRequest
from hscr.learn.probe import probe_adapter
from hscr.models.digest import model_digest
from hscr.models.vlm import VLM
from hscr.records import AdapterVersion, Job, PreferenceRecord, Replica, Response
from hscr.serving import EngineKind, Serving
from hscr.store.blobs import bytes_digest
from hscr.store.releases import add_adapter
from hscr.store.store import Store
from tests.serving import EngineProcess
from tests.workers.harness import Processes, png, submit
from workers.contract import ReleasePayload
from workers.settings import EMBEDDED_MODEL

SEEN = timedelta(seconds=5)
PICTURES = tuple(png(seed) for seed in range(1, 7))


class Engine(EngineProcess):
    """Serves `model` as "base"."""

    def __init__(self, model: Path, port: int, kind: EngineKind = "embedded") -> None:
        super().__init__(kind, Serving(model, "base", port))
        self.url = self.address

    def answer(self, model: str) -> str:
        request = ChatRequest.ask(model, "what is this?", png(1))
        return str(self.ask("chat", request).text)


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
    processes: Processes,
    engine: EngineProcess,
    *,
    url: str | None = None,
    name: str = "one",
    **options: Any,
) -> subprocess.Popen[bytes]:
    """The agent called `name`, which reaches the engine at `url` if that is not the engine's own."""
    return processes.start(
        "workers.agent",
        HSCR_ENGINE_URL=url or engine.address,
        HSCR_REPLICA_ID=name,
        HSCR_MODEL_PATH=str(EMBEDDED_MODEL),
        HSCR_RETRY_SECONDS="0.5",
        HSCR_UNLOAD_GRACE_SECONDS="0.2",
        **options,
    )


def release(store: Store, version: str) -> Job:
    """Submitted, whatever its evaluation says."""
    payload = ReleasePayload(version_name=version, actor="key_1", reason="a test", override=True)
    return submit(store, payload)


def replicas(store: Store) -> dict[str, Replica]:
    """Those that reported lately, by name."""
    return {replica.id: replica for replica in store.releases.replicas(seen_within=SEEN)}


def loaded_by_each(store: Store) -> dict[str, set[str]]:
    return {name: set(replica.loaded) for name, replica in replicas(store).items()}


def replica(store: Store) -> Replica | None:
    """The only one."""
    live = store.releases.replicas(seen_within=SEEN)
    return live[0] if live else None


def loaded(store: Store) -> tuple[str, ...]:
    present = replica(store)
    return present.loaded if present else ()
