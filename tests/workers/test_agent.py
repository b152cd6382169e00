"""The agent beside a real embedded engine."""

import json
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

from hscr.models.digest import model_digest, template_digest
from hscr.records import AdapterState, AdapterVersion
from hscr.store.store import Store
from tests.waiting import wait_until
from tests.workers.engines import SEEN, Engine, loaded, probe, register, replica, start_agent
from tests.workers.harness import Processes, make_adapter
from tests.workers.proxy import LOAD, Proxy
from workers.agent import intended_use
from workers.settings import EMBEDDED_MODEL


def promote(store: Store, version: str | None) -> None:
    store.releases.promote(version, actor="a", reason="r", override=True, replicas_seen=SEEN)


def propose(store: Store, version: str | None) -> None:
    store.releases.propose(version, actor="a", reason="r")


def test_an_agent_loads_probes_reports_unloads_and_goes(
    store: Store,
    processes: Processes,
    engine: Engine,
    folders: list[Path],
    probes: list[Any],
    tmp_path: Path,
) -> None:
    """One life: base only, a candidate, its promotion, another, a restart of the engine, the end."""
    first, second = (
        register(store, EMBEDDED_MODEL, *each) for each in zip(folders[:2], probes[:2], strict=True)
    )
    engine.load("somebody's", folders[0])
    ready = tmp_path / "ready"
    ready.write_text("left by an agent that was killed")
    agent = start_agent(processes, engine, HSCR_READY_FILE=str(ready))

    seen = wait_until(lambda: replica(store), seconds=60)
    assert seen.ready
    wait_until(lambda: ready.exists() and not ready.read_text(), what="a new file that says so")
    assert (seen.model, seen.model_digest, seen.template_digest) == (
        "base", model_digest(EMBEDDED_MODEL), template_digest(EMBEDDED_MODEL),
    )  # fmt: skip
    assert seen.numeric_mode == "cpu/float32"
    wait_until(lambda: engine.adapters() == set(), what="the stranger being unloaded")

    propose(store, first.name)
    wait_until(lambda: loaded(store) == (first.name,), what="the candidate being reported")
    assert engine.answer(first.name) != engine.answer("base")
    promote(store, first.name)
    propose(store, second.name)
    wait_until(lambda: set(loaded(store)) == {first.name, second.name}, what="both")
    promote(store, second.name)

    # A gateway that still answers with the old version keeps it; base and second are desired now.
    store.releases.report_gateway("gw", epoch=store.releases.pointer().epoch, in_flight={first.name: 1})
    propose(store, None)
    promote(store, None)
    epoch = store.releases.pointer().epoch
    store.releases.report_gateway("gw", epoch=epoch, in_flight={first.name: 1})
    cycles = [replica(store)]
    wait_until(lambda: (seen := replica(store)) and seen.seen_at > cycles[0].seen_at, what="a cycle")
    assert first.name in engine.adapters()
    store.releases.report_gateway("gw", epoch=epoch, in_flight={first.name: 0})
    wait_until(lambda: engine.adapters() == {second.name}, what="the old version being unloaded")

    engine.kill()
    wait_until(lambda: (seen := replica(store)) and not seen.ready, what="the outage being reported")
    assert "did not answer" in str(replica(store).problem)
    assert loaded(store) == ()
    wait_until(lambda: not ready.exists(), what="the file being taken away")
    engine.start()
    wait_until(lambda: loaded(store) == (second.name,), what="everything being loaded again")
    assert replica(store).ready
    assert replica(store).problem is None
    wait_until(ready.exists, what="the file that says so again")

    agent.send_signal(signal.SIGTERM)
    assert agent.wait(15) == 0
    assert replica(store) is None
    assert not ready.exists()
    assert engine.adapters() == {second.name}, "the engine goes on answering"


def spoilt(store: Store, folder: Path, probed: dict[str, Any], out: Path) -> AdapterVersion:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    weights = load_file(out / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, out / "adapter_model.safetensors")
    return register(store, EMBEDDED_MODEL, out, probed)


def test_unfit_versions_never_go_live(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """NaN is refused before the engine sees it; a no-op and foreign answers after it was asked."""
    nan = spoilt(store, folders[0], probes[0], tmp_path / "nan")
    noop = register(
        store, EMBEDDED_MODEL, make_adapter(EMBEDDED_MODEL, tmp_path / "noop", seed=3, scale=1e-6), probes[0]
    )
    foreign = register(store, EMBEDDED_MODEL, folders[1], probes[0])
    start_agent(processes, engine)

    for version, why in ((nan, "NaN"), (noop, "exactly as without it")):
        propose(store, version.name)
        wait_until(
            lambda: store.releases.adapter(version.name).state is AdapterState.REFUSED,  # noqa: B023
            seconds=60,
            what=why,
        )
        assert engine.adapters() == set()
        assert why in processes.logs()

    propose(store, foreign.name)
    wait_until(
        lambda: (seen := replica(store)) and "otherwise than its trainer" in str(seen.problem),
        what="the problem of foreign answers",
    )
    assert store.releases.adapter(foreign.name).state is AdapterState.READY, "another engine may do better"
    assert loaded(store) == ()
    wait_until(lambda: engine.adapters() == set(), what="it being unloaded")


def test_damaged_files_of_a_serving_version_are_a_problem_of_the_replica(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any]
) -> None:
    version = register(store, EMBEDDED_MODEL, folders[0], probes[0])
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE pointer SET active = ?", (version.name,))
    config = store.blobs.folder(version.digest) / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"r": 5}))
    start_agent(processes, engine)

    seen = wait_until(lambda: (now := replica(store)) and now.problem and now, seconds=60)
    assert "not those that were stored" in str(seen.problem)
    assert not seen.ready
    assert store.releases.adapter(version.name).state is AdapterState.READY
    config.write_text(good)
    wait_until(lambda: loaded(store) == (version.name,), what="the repaired version")
    assert replica(store).ready


def test_an_engine_holds_active_previous_candidate_and_one_more(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any], tmp_path: Path
) -> None:
    """What has no slot is not asked for, is told, and comes when one is free."""
    versions = [register(store, EMBEDDED_MODEL, *each) for each in zip(folders, probes, strict=True)]
    fourth = make_adapter(EMBEDDED_MODEL, tmp_path / "4", seed=4, scale=0.07)
    versions.append(register(store, EMBEDDED_MODEL, fourth, probe(EMBEDDED_MODEL, fourth)))
    active, previous, candidate, leased = (version.name for version in versions)
    with Proxy(engine.url) as proxy:
        start_agent(processes, engine, url=proxy.url, HSCR_ADAPTER_SLOTS="3")
        for version in (previous, active):
            propose(store, version)
            wait_until(lambda: version in loaded(store), seconds=60, what="the version")  # noqa: B023
            promote(store, version)
        store.releases.lease_version("job_1", leased, timedelta(minutes=5))
        wait_until(lambda: leased in loaded(store), what="the version that a job leases")

        propose(store, candidate)
        seen = wait_until(lambda: (now := replica(store)) and now.problem and now, what="the want of a slot")
        assert f"{candidate}: no slot is free for it" in seen.problem
        assert leased in seen.problem, "it says what is in the way"
        assert seen.ready, "a candidate without a slot makes no replica unready"
        assert candidate not in proxy.loads()
        store.releases.release_leases("job_1")
        wait_until(lambda: set(loaded(store)) == {active, previous, candidate}, what="the candidate")
    assert replica(store).problem is None


def test_what_somebody_loaded_under_a_versions_name_is_replaced(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any]
) -> None:
    """Also where no probe could tell: its images were deleted with their studies."""
    version = register(store, EMBEDDED_MODEL, folders[0], {"items": []})
    right, wrong = engine_answers(engine, folders[:2])
    engine.load(version.name, folders[1])
    assert engine.answer(version.name) == wrong
    propose(store, version.name)
    start_agent(processes, engine)
    wait_until(lambda: loaded(store) == (version.name,), seconds=60, what="the version")
    assert engine.answer(version.name) == right


def engine_answers(engine: Engine, folders: list[Path]) -> list[str]:
    answers = []
    for folder in folders:
        engine.load("asked", folder)
        answers.append(engine.answer("asked"))
        engine.unload("asked")
    return answers


def test_a_store_that_cannot_be_read_keeps_back_one_version_and_no_other(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any]
) -> None:
    version = register(store, EMBEDDED_MODEL, folders[0], probes[0])
    picture = store.blobs.path(probes[0]["items"][0]["image_digest"])
    picture.rename(picture.with_suffix(".away"))
    picture.mkdir()
    other = register(store, EMBEDDED_MODEL, folders[1], {"items": []})
    for name in (version.name, other.name):
        store.releases.lease_version("job_1", name, timedelta(minutes=5))
    start_agent(processes, engine)
    wait_until(lambda: loaded(store) == (other.name,), seconds=60, what="the other version")
    seen = wait_until(lambda: (now := replica(store)) and now.problem and now, what="the problem")
    assert f"{version.name}: The store cannot be read (IsADirectoryError)" in seen.problem
    assert seen.ready
    picture.rmdir()
    picture.with_suffix(".away").rename(picture)
    wait_until(lambda: set(loaded(store)) == {version.name, other.name}, what="both")


def test_a_restarted_engine_is_not_ready_before_it_has_what_serves(
    store: Store, processes: Processes, engine: Engine, folders: list[Path], probes: list[Any]
) -> None:
    version = register(store, EMBEDDED_MODEL, folders[0], probes[0])
    with Proxy(engine.url) as proxy:
        start_agent(processes, engine, url=proxy.url)
        propose(store, version.name)
        wait_until(lambda: loaded(store) == (version.name,), seconds=60, what="the version")
        promote(store, version.name)
        with proxy.hold(LOAD, version.name) as load:
            engine.kill()
            wait_until(lambda: (seen := replica(store)) and not seen.ready, what="the outage")
            engine.start()
            load.wait()
            seen = replica(store)
            assert (seen.ready, seen.loaded) == (False, ())
        ready = wait_until(lambda: (seen := replica(store)) and seen.ready and seen, what="readiness")
        assert ready.loaded == (version.name,)


def test_intended_use_comes_from_the_models_card(tmp_path: Path) -> None:
    assert intended_use(tmp_path) == ""
    (tmp_path / "README.md").write_text(
        "# M\n\n## Intended use\n\nResearch only.\n\nNot care.\n\n## Limits\nx\n"
    )
    assert intended_use(tmp_path) == "Research only.\n\nNot care."


def test_the_embedded_models_card_states_its_intended_use() -> None:
    assert "Not for clinical care" in intended_use(EMBEDDED_MODEL)
