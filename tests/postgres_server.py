"""A real PostgreSQL server of its own, which can be killed, paused and started again.

Debian installs the programs outside PATH, and the server refuses to run as root: then it runs as `nobody`.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Self

import psycopg
import pytest

from hscr.store.database import Database
from tests.certificates import Certificates
from tests.redis_server import free_port
from tests.waiting import wait_until

USER = "hscr"
PASSWORD = "not-for-logs"
_TEMPLATE = "hscr_template"


@cache
def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, of the newest version installed."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *Path("/usr/pgsql").glob("bin/initdb")]
    newest = sorted(found, key=lambda path: float(path.parts[-3]) if path.parts[-3].isdecimal() else 0)
    named = shutil.which("initdb")
    return newest[-1].parent if newest else Path(named).resolve().parent if named else None


def require_programs() -> Path:
    """Skips the test where there is no PostgreSQL; fails it where HSCR_REQUIRE_POSTGRES is set, as in CI."""
    found = programs()
    if found is None and os.environ.get("HSCR_REQUIRE_POSTGRES"):
        pytest.fail("PostgreSQL is not installed here, but must be tested with: apt-get install postgresql")
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return found


class PostgresServer:
    """`durable` confirms a commit when it is on disk; without, a power cut may lose it.

    With `certificates` it speaks TLS, and only that.
    """

    def __init__(
        self,
        *,
        durable: bool = False,
        parent: Path | None = None,
        certificates: Certificates | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        """address: where it listens, and who can reach that may log in."""
        self.port = free_port()
        self._address = address
        self.certificates = certificates
        self._programs = require_programs()
        self._durable = durable
        # Not in pytest's folders: those are closed to other users.
        self._folder = Path(tempfile.mkdtemp(prefix="hscr-postgres-", dir=parent))
        self._process: subprocess.Popen[bytes] | None = None
        self._made = count(1)

    def url(self, database: str = "postgres") -> str:
        """As a person would write it: without a driver."""
        return f"postgresql://{USER}:{PASSWORD}@{self._address}:{self.port}/{database}"

    @property
    def log(self) -> Path:
        return self._folder / "postgres.log"

    def start(self) -> Self:
        """Make the cluster if there is none, and wait until the server answers."""
        if not (self._folder / "data").exists():
            self._init()
        durable = "on" if self._durable else "off"
        options = {
            "listen_addresses": self._address, "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            # On in any case: it keeps a commit over `kill`, and fsync over a power cut.
            "fsync": durable, "synchronous_commit": "on", "full_page_writes": durable,
            "max_connections": "200", "shared_buffers": "64MB", "log_line_prefix": "%m %a ",
        }  # fmt: skip
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self._folder / "data"), *settings],
                stdout=log, stderr=log, cwd=self._folder, **_identity(),
            )  # fmt: skip
        wait_until(self.answers, what="PostgreSQL answering")
        return self

    def kill(self) -> None:
        """As `kill -9` of the server and all it serves: every connection breaks, nothing is tidied up."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """Break every connection, write everything down, end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        """End, and leave no file."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder)

    def answers(self) -> bool:
        try:
            self.query("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def query(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Outside any transaction."""
        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> str:
        """The URL of a new database without tables."""
        name = f"empty_{next(self._made)}"
        self.query(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.url(name)

    def migrated(self) -> str:
        """The URL of a new database with this code's tables, copied from one that was migrated once."""
        if not self.query(f"SELECT 1 FROM pg_database WHERE datname = '{_TEMPLATE}'"):
            self.query(f"CREATE DATABASE {_TEMPLATE}")
            template = Database(self.url(_TEMPLATE))
            template.upgrade()
            template.close()
        name = f"test_{next(self._made)}"
        self.query(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY file_copy")
        return self.url(name)

    def _init(self) -> None:
        if (identity := _identity()) and "user" in identity:
            os.chown(self._folder, int(identity["user"]), int(identity["group"]))
        secret = self._folder / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        subprocess.run(
            [
                str(self._programs / "initdb"), "-D", str(self._folder / "data"), "-U", USER,
                "--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C",
                "--no-sync", "--no-instructions",
            ],
            check=True, capture_output=True, cwd=self._folder, **_identity(),
        )  # fmt: skip
        with (self._folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet scram-sha-256\n")
        if self.certificates is not None:
            self._speak_tls(self.certificates)

    def _speak_tls(self, certificates: Certificates) -> None:
        data = self._folder / "data"
        for name, source in (("server.crt", certificates.certificate), ("server.key", certificates.key)):
            shutil.copyfile(source, data / name)
            (data / name).chmod(0o600)
            shutil.chown(data / name, data.owner(), data.group())
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("ssl = on\n")
        rules = data / "pg_hba.conf"
        rules.write_text(re.sub(r"(?m)^host ", "hostssl ", rules.read_text()))


def serving(*, durable: bool = False) -> Iterator[PostgresServer]:
    """For a fixture: a server that is gone with all its files afterwards."""
    server = PostgresServer(durable=durable)
    try:
        yield server.start()
    finally:
        server.remove()


def _identity() -> dict[str, int]:
    """What to start the server as, for `subprocess`: itself, or somebody without rights instead of root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # a child that ended with its parent
        os.kill(pid, number)
