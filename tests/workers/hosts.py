"""Hosts as network namespaces of this kernel on one bridge; a cut between two loses all packets in silence.

Needs root, iproute2 and iptables. Files and processes are shared: only the network is apart.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Self

import pytest

_PROGRAMS = ("ip", "iptables")


def require_hosts() -> None:
    """Skips the test where there can be none; fails it where HSCR_REQUIRE_HOSTS is set, as in CI."""
    missing = _missing()
    if missing and os.environ.get("HSCR_REQUIRE_HOSTS"):
        pytest.fail(f"Must be tested here, and cannot: {missing}")
    if missing:
        pytest.skip(missing)


def _missing() -> str | None:
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: apt-get install iproute2 iptables"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Host(NamedTuple):
    namespace: str
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        """Before a command, what runs it here."""
        return ("ip", "netns", "exec", self.namespace)

    def run(self, *command: str) -> None:
        _run(*self.within, *command)


class Network:
    """This process is on it, too, at `here`."""

    def __init__(self) -> None:
        self._net = f"10.93.{os.getpid() % 250}"
        self._prefix = f"h{os.getpid()}"
        self._hosts: list[Host] = []
        self._exits = ExitStack()
        self.here = f"{self._net}.1"

    def __enter__(self) -> Self:
        bridge = self._prefix
        _run("ip", "link", "add", bridge, "type", "bridge")
        self._exits.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "address", "add", f"{self.here}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def host(self) -> Host:
        number = len(self._hosts) + 2
        host = Host(f"{self._prefix}-{number}", f"{self._net}.{number}")
        _run("ip", "netns", "add", host.namespace)
        self._exits.callback(_run, "ip", "netns", "del", host.namespace)  # and its link with it
        outside = host.namespace  # names of links and of namespaces do not meet
        _run(
            *("ip", "link", "add", outside, "type", "veth"),
            *("peer", "name", "eth0", "netns", host.namespace),
        )
        _run("ip", "link", "set", outside, "master", self._prefix, "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "link", "set", "lo", "up")
        self._hosts.append(host)
        return host

    @contextmanager
    def cut(self, one: Host, other: Host) -> Iterator[None]:
        """Nothing that either sends reaches the other."""
        with _dropped(one, "--source", other.address), _dropped(other, "--source", one.address):
            yield

    @contextmanager
    def cut_from_here(self, host: Host, port: int) -> Iterator[None]:
        """Nothing that is sent here from `port` reaches the host."""
        with _dropped(host, "--source", self.here, "--protocol", "tcp", "--sport", str(port)):
            yield


@contextmanager
def _dropped(host: Host, *which: str) -> Iterator[None]:
    host.run("iptables", "--append", "INPUT", *which, "--jump", "DROP")
    try:
        yield
    finally:
        host.run("iptables", "--delete", "INPUT", *which, "--jump", "DROP")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
