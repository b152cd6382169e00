"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler as processes, as `build.sh` made them."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.cluster.api import Api
from tests.redis_server import free_port
from tests.waiting import wait_until

CACHE = Path(__file__).parents[2] / ".cache" / "cluster"
START_SECONDS = 120
USERS = {"operator": "system:masters", "tenant": "tenants"}
"""Who may ask, by a token of the same name, and the group that roles are bound to."""


@dataclass(frozen=True)
class ControlPlane:
    """Everything that decides; nodes are somebody else's."""

    folder: Path
    url: str

    def api(self, user: str = "operator") -> Api:
        return Api(self.url, user, self.certificate)

    @property
    def certificate(self) -> Path:
        return self.folder / "certificates" / "apiserver.crt"

    def kubeconfig(self, user: str = "operator") -> Path:
        """A file for programs that ask as this user."""
        server = {"server": self.url, "certificate-authority": str(self.certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": user, "user": {"token": user}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        file = self.folder / f"{user}.kubeconfig"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config))
        return file


@contextlib.contextmanager
def control_plane(folder: Path) -> Iterator[ControlPlane]:
    """All four, answering; gone afterwards. What they print lies in `folder`, a file for each."""
    with contextlib.ExitStack() as running:
        store = f"http://127.0.0.1:{free_port()}"
        running.enter_context(_etcd(folder, store))
        plane = ControlPlane(folder, f"https://127.0.0.1:{(port := free_port())}")
        running.enter_context(_apiserver(folder, store, port))
        wait_until(lambda: _ready(plane), seconds=START_SECONDS, what=f"kube-apiserver ({folder})")
        config = str(plane.kubeconfig())
        common = ("--kubeconfig", config, "--leader-elect=false", "--port=0", "--secure-port=0")
        running.enter_context(_controllers(plane, *common))
        running.enter_context(_process(folder, CACHE / "bin/kube-scheduler", *common))
        yield plane


def _etcd(folder: Path, store: str) -> contextlib.AbstractContextManager[None]:
    peers = f"http://127.0.0.1:{free_port()}"
    return _process(
        folder, CACHE / "venv/bin/etcd", "--data-dir", str(folder / "rows"), "--unsafe-no-fsync",
        "--listen-client-urls", store, "--advertise-client-urls", store, "--listen-peer-urls", peers,
        "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}",
    )  # fmt: skip


def _apiserver(folder: Path, store: str, port: int) -> contextlib.AbstractContextManager[None]:
    tokens = folder / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(f"{user},{user},{user},{group}\n" for user, group in USERS.items()))
    signing = str(folder / "signing.key")
    subprocess.run(["openssl", "genrsa", "-out", signing, "2048"], check=True, capture_output=True)
    return _process(
        folder, CACHE / "bin/kube-apiserver", "--etcd-servers", store,
        "--cert-dir", str(folder / "certificates"),
        "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port", str(port),
        "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
        "--token-auth-file", str(tokens), "--authorization-mode=RBAC",
        "--service-account-issuer=https://kubernetes.default.svc", "--api-audiences=https://kubernetes.default.svc",
        "--service-account-signing-key-file", signing, "--service-account-key-file", signing,
        "--feature-gates=TTLAfterFinished=true",
    )  # fmt: skip


def _controllers(plane: ControlPlane, *common: str) -> contextlib.AbstractContextManager[None]:
    # The provisioner of claims makes a folder for each in /tmp/hostpath_pv.
    return _process(
        plane.folder, CACHE / "bin/kube-controller-manager", *common, "--use-service-account-credentials",
        "--service-account-private-key-file", str(plane.folder / "signing.key"),
        "--root-ca-file", str(plane.certificate), "--feature-gates=TTLAfterFinished=true",
        "--horizontal-pod-autoscaler-sync-period=1s", "--enable-hostpath-provisioner",
    )  # fmt: skip


@contextlib.contextmanager
def _process(folder: Path, program: Path, *arguments: str) -> Iterator[None]:
    log = folder / f"{program.name}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen([str(program), *arguments], cwd=folder, stdout=output, stderr=output) as process,
    ):
        try:
            yield
        finally:
            ended = process.poll()
            process.kill()
            assert ended is None, f"{program.name} ended with {ended}: {log}"


def _ready(plane: ControlPlane) -> bool:
    if not plane.certificate.exists():
        return False
    try:
        with plane.api() as api:
            return api.ask("GET", "/readyz").is_success
    except httpx2.TransportError:
        return False
