"""Adapters that must never reach an engine, beside a real one that answers all the while."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sqlalchemy import insert

from hscr.models.digest import model_digest
from hscr.records import AdapterState, AdapterVersion
from hscr.store.blobs import READY
from hscr.store.store import Store
from hscr.store.tables import adapters
from tests.waiting import wait_until
from tests.workers.engines import SEEN, Engine, loaded, register, replica, start_agent
from tests.workers.harness import FAST, Processes, migrated
from tests.workers.proxy import Proxy
from tests.workers.traffic import Traffic
from workers.adapter_check import CONFIG, WEIGHTS
from workers.settings import EMBEDDED_MODEL, WorkerSettings

LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@dataclass
class Stand:
    """An engine that serves `good`, with its agent behind a proxy and a client before it."""

    store: Store
    engine: Engine
    proxy: Proxy
    traffic: Traffic
    good: AdapterVersion
    folder: Path
    probe: dict[str, Any]


@pytest.fixture(scope="module")
def stand(
    running: Engine, folders: list[Path], probes: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    home = tmp_path_factory.mktemp("bad")
    settings = migrated(WorkerSettings(home=home / "home", model_path=EMBEDDED_MODEL, **FAST))
    processes = Processes(home, settings)
    with Store.open(settings) as store, Proxy(running.url) as proxy:
        good = register(store, EMBEDDED_MODEL, folders[0], probes[0])
        start_agent(processes, running, url=proxy.url)
        store.releases.propose(good.name, actor="a", reason="r")
        wait_until(lambda: loaded(store) == (good.name,), seconds=60, what="the good version")
        store.releases.promote(good.name, actor="a", reason="r", override=True, replicas_seen=SEEN)
        texts = {name: running.answer(name) for name in ("base", good.name)}
        with Traffic(running.url, texts).flowing() as traffic:
            yield Stand(store, running, proxy, traffic, good, folders[0], probes[0])
    processes.stop()


def refused(stand: Stand, version: AdapterVersion, why: str, state: AdapterState) -> None:
    """It is named the candidate, and the agent says why not, before the engine hears of it."""
    store = stand.store
    store.releases.propose(version.name, actor="a", reason="r")
    told = wait_until(
        lambda: (seen := replica(store)) and version.name in (seen.problem or "") and seen.problem, what=why
    )
    assert why in told
    assert store.releases.adapter(version.name).state is state
    stand.traffic.unharmed()
    assert stand.engine.adapters() == {stand.good.name}
    assert loaded(store) == (stand.good.name,)
    assert stand.proxy.loads() == [stand.good.name], "nothing else was ever loaded"
    store.releases.propose(None, actor="a", reason="r")


Tensors = dict[str, np.ndarray]


def weights(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        written = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(written | changes))

    return spoil


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return spoil


def put(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[B][3, 1] = value

    return change


def narrow(tensors: Tensors) -> None:
    tensors[A] = np.ascontiguousarray(tensors[A][:, :-1])


def less(tensors: Tensors, *names: str) -> None:
    for name in names:
        del tensors[name]


def rank_two(tensors: Tensors, *names: str) -> None:
    """Of A, its first two rows; of B, its first two columns."""
    for name in names:
        tensors[name] = np.ascontiguousarray(tensors[name][:2] if name == A else tensors[name][:, :2])


def moved(tensors: Tensors, where: str) -> None:
    for name in (A, B):
        tensors[name.replace("language_model.layers.0.self_attn.q_proj", where)] = tensors[name]


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def longer_header(data: bytes) -> bytes:
    return (int.from_bytes(data[:8], "little") + 64).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(weights(put(float("nan"))), f"{B} holds NaN or infinity", id="NaN"),
        pytest.param(weights(put(float("-inf"))), f"{B} holds NaN or infinity", id="infinity"),
        pytest.param(weights(narrow), f"{A} has shape [4, 127], not [4, 128]", id="wrong shape"),
        pytest.param(weights(lambda t: less(t, A, B)), "q_proj is a target without weights", id="no layer"),
        pytest.param(weights(lambda t: less(t, A)), "lacks its other half, lora_A", id="no A"),
        pytest.param(weights(lambda t: less(t, B)), "lacks its other half, lora_B", id="no B"),
        pytest.param(weights(lambda t: rank_two(t, A)), f"{A} has shape [2, 128]", id="ranks of A and B"),
        pytest.param(weights(lambda t: rank_two(t, A, B)), "has shape", id="rank of a layer"),
        pytest.param(config(r=8), "has shape", id="rank of the configuration"),
        pytest.param(config(r=128), "has rank 128; 1 to 64", id="too high a rank"),
        pytest.param(config(lora_alpha=float("inf")), "has lora_alpha inf", id="alpha"),
        pytest.param(
            weights(lambda t: moved(t, "vision_tower.encoder.layers.0.self_attn.q_proj")),
            "vision_tower.encoder.layers.0.self_attn.q_proj", id="vision",
        ),
        pytest.param(
            weights(lambda t: moved(t, "multi_modal_projector.linear_1")),
            "multi_modal_projector.linear_1", id="projector",
        ),
        pytest.param(config(use_dora=True), "sets use_dora", id="DoRA"),
        pytest.param(config(modules_to_save=["lm_head"]), "sets modules_to_save", id="modules_to_save"),
        pytest.param(raw(lambda data: data[:-1]), f"{WEIGHTS} cannot be read", id="truncated"),
        pytest.param(raw(lambda _: b""), f"{WEIGHTS} cannot be read", id="0 bytes"),
        pytest.param(raw(longer_header), f"{WEIGHTS} cannot be read", id="header length"),
        pytest.param(pickled, "adapter_model.bin does not belong", id="pickle"),
    ],
)  # fmt: skip
def test_bad_files(stand: Stand, tmp_path: Path, spoil: Callable[[Path], None], why: str) -> None:
    folder = Path(shutil.copytree(stand.folder, tmp_path / "bad"))
    spoil(folder)
    version = register(stand.store, EMBEDDED_MODEL, folder, stand.probe)
    refused(stand, version, why, AdapterState.REFUSED)


def registered(stand: Stand, tmp_path: Path) -> tuple[AdapterVersion, Path]:
    """A fit version of its own, and where its files are kept."""
    folder = Path(shutil.copytree(stand.folder, tmp_path / "other"))
    (folder / "README.md").write_text(tmp_path.name)
    version = register(stand.store, EMBEDDED_MODEL, folder, stand.probe)
    return version, stand.store.blobs.folder(version.digest)


def test_links_in_the_store(stand: Stand, tmp_path: Path) -> None:
    """To the very bytes that were stored, so that only the link is wrong."""
    version, folder = registered(stand, tmp_path)
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    (folder / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    refused(stand, version, f"{WEIGHTS} is a symbolic link", AdapterState.REFUSED)


def test_other_bytes_than_were_stored(stand: Stand, tmp_path: Path) -> None:
    """A damaged copy says nothing against the version: storing it again repairs it."""
    version, folder = registered(stand, tmp_path)
    config(lora_alpha=7)(folder)
    refused(stand, version, "not those that were stored", AdapterState.READY)


def test_a_folder_without_its_marker(stand: Stand, tmp_path: Path) -> None:
    version, folder = registered(stand, tmp_path)
    (folder / READY).unlink()
    refused(stand, version, "Nothing is stored under", AdapterState.READY)


@pytest.mark.parametrize(
    "name",
    [
        "../../hscr@{digest}", "/etc/hscr@{digest}", "hs\0cr@{digest}", "hscr@{digest}/..", "bare",
        "hscr@000000000000", "x" * 65 + "@{digest}",
    ],
    ids=["parent", "absolute", "NUL", "behind", "no digest", "another digest", "too long"],
)  # fmt: skip
def test_names_that_somebody_wrote_into_the_database(stand: Stand, tmp_path: Path, name: str) -> None:
    """The store itself registers none of them."""
    folder = Path(shutil.copytree(stand.folder, tmp_path / "other"))
    (folder / "README.md").write_text(tmp_path.name)
    digest = stand.store.blobs.put_folder(folder)
    version = AdapterVersion(
        name=name.format(digest=digest[:12]), digest=digest, base_digest=model_digest(EMBEDDED_MODEL),
        job_id="job_1", config={}, records=8, records_digest="r", probe=stand.probe,
    )  # fmt: skip
    row = version.model_dump(include={"name", "digest", "state", "job_id", "created_at"})
    with stand.store.database.write() as connection:
        connection.execute(insert(adapters).values(**row, body=version.model_dump(mode="json")))
    refused(stand, version, "is no name of these files", AdapterState.REFUSED)
