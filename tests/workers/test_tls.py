"""Database and queue over TLS, with certificates of an authority that only this installation trusts.

PostgreSQL ends TLS itself; the queue's server here was built without, so a front does it.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy import column, select, text

from hscr.errors import DatabaseUnavailable
from hscr.probes import redis_trouble
from hscr.records import JobState
from hscr.store.database import Database
from hscr.store.line import Line
from hscr.store.store import Store
from tests.certificates import Certificates, TlsFront
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.workers.harness import FAST, Processes, finished, submit
from workers.broker import build
from workers.contract import ReleasePayload
from workers.settings import WorkerSettings

CONNECTIONS = """
    SELECT count(*), bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
    WHERE application_name = 'hscr'"""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """Lets nobody in without TLS."""
    server = PostgresServer(certificates=Certificates.make(tmp_path_factory.mktemp("tls") / "postgres"))
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of the queue: another authority than the database's."""
    return Certificates.make(tmp_path_factory.mktemp("tls") / "redis")


@pytest.fixture(scope="module")
def front(certificates: Certificates, redis_server: RedisServer) -> Iterator[TlsFront]:
    with TlsFront(certificates, redis_server.port) as front:
        yield front


def verified(server: PostgresServer, *, host: str = "localhost", authority: Path | None = None) -> str:
    """The URL of a new database, as docs/deploy-kubernetes.md writes it."""
    assert server.certificates is not None
    url = server.migrated().replace("127.0.0.1", host)
    return f"{url}?sslmode=verify-full&sslrootcert={authority or server.certificates.authority}"


def queue(front: TlsFront, authority: Path, *, host: str = "localhost") -> str:
    return f"rediss://{host}:{front.port}/90?ssl_ca_certs={authority}"


def test_a_job_goes_through_database_and_queue_over_tls(
    tmp_path: Path, secured: PostgresServer, front: TlsFront, certificates: Certificates
) -> None:
    url = verified(secured)
    settings = WorkerSettings(
        home=tmp_path / "home", database_url=url, redis_url=queue(front, certificates.authority), **FAST
    )
    processes = Processes(tmp_path, settings)
    try:
        with Store.open(settings) as store:
            job = submit(
                store, ReleasePayload(version_name="nobody@000000000000", actor="me", reason="a test")
            )
            processes.relay()
            processes.worker("control")
            ended = finished(store, job, seconds=120)
            number, all_by_tls = secured.query(CONNECTIONS)[0]
    finally:
        processes.stop()
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["slug"] == "not-found", "a worker looked for the version"
    assert number
    assert all_by_tls


def test_a_database_of_another_authority_or_name_is_refused_and_the_remedy_names_the_parameter(
    secured: PostgresServer, certificates: Certificates
) -> None:
    for url in (
        verified(secured, authority=certificates.authority),
        verified(secured, authority=Path("/nowhere/ca.crt")),
        verified(secured, host="127.0.0.1"),
    ):
        for ask in (lambda url: Database(url).revision(), by_line):
            with pytest.raises(DatabaseUnavailable, match="certificate") as caught:
                ask(url)
            assert "sslrootcert" in caught.value.remedy


def test_a_gateways_own_lines_go_over_tls(secured: PostgresServer) -> None:
    (row,) = by_line(verified(secured))
    assert row == {"ssl": True}


def by_line(url: str) -> list[dict[str, object]]:
    """Whether the line itself is encrypted, asked through it."""

    async def asked() -> list[dict[str, object]]:
        line = Line(Database(url))
        try:
            return await line(_MINE)
        finally:
            await line.close()

    return asyncio.run(asked())


_MINE = select(column("ssl")).select_from(text("pg_stat_ssl")).where(text("pid = pg_backend_pid()"))


def test_a_queue_of_another_authority_or_name_is_refused(
    secured: PostgresServer, front: TlsFront, certificates: Certificates
) -> None:
    assert secured.certificates is not None
    for url in (
        queue(front, secured.certificates.authority),
        queue(front, certificates.authority, host="127.0.0.1"),
        f"rediss://localhost:{front.port}/90",  # of no authority that this machine trusts
    ):
        with (
            pytest.raises(OperationalError, match="certificate verify failed"),
            build(WorkerSettings(redis_url=url)).connection_for_write() as connection,
        ):
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        assert "certificate verify failed" in str(redis_trouble(url))


def test_the_doctor_asks_the_queue_over_tls(front: TlsFront, certificates: Certificates) -> None:
    assert redis_trouble(queue(front, certificates.authority)) is None
    assert redis_trouble(f"rediss://localhost:{front.port}/90?ssl_cert_reqs=none") is None
