"""What the images are made of and how Compose starts them, read from the files: no container is run."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hscr import __version__
from hscr.records import Role
from hscr.serving import Serving
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.images.compose import ALONE, PROFILES, ROOT, configuration

LOCKS = ROOT / "requirements"
OURS = re.compile(r"hscr-(gateway|worker|worker-cuda|engine):")


def locked(name: str) -> dict[str, str]:
    """Release by package; every one with a hash."""
    blocks = re.split(r"(?m)^(?=[a-z])", (LOCKS / f"{name}.txt").read_text())
    found = {}
    for block in blocks:
        if pinned := re.match(r"([a-z0-9.-]+)==(\S+)", block):
            assert "--hash=sha256:" in block, pinned[0]
            found[pinned[1]] = pinned[2]
    return found


@pytest.mark.parametrize("lock", ["gateway", "worker", "build"])
def test_an_image_has_the_releases_that_are_tested(lock: str) -> None:
    tested, installed = locked("runtime"), locked(lock)
    assert installed
    assert {name: release for name, release in installed.items() if tested.get(name) != release} == {}


def test_the_gateways_lock_has_nothing_to_compute_with() -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "pyarrow", "matplotlib", "pydicom-data"}
    assert heavy & locked("gateway").keys() == set()
    assert heavy & locked("runtime").keys() == heavy - {"torch"}


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/stand-in/Dockerfile"])
def test_hadolint_has_nothing_to_say(file: str) -> None:
    linter = ROOT / ".venv-images" / "bin" / "hadolint"
    done = subprocess.run([linter, ROOT / file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_wheel_holds_what_the_images_need(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "--quiet", "--wheel-dir", tmp_path, _copied(tmp_path / "source")],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {str(path.relative_to(ROOT)) for path in _sources()}
    assert wanted - packed == set()


def _sources() -> list[Path]:
    folders = ("hscr", "service", "workers")
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def _copied(folder: Path) -> Path:
    """The sources alone: a build leaves files beside them."""
    for path in [*_sources(), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_one_engine_with_its_agent_runs_by_default_and_another_in_the_profile_gpu() -> None:
    core = {"gateway", "worker-control", "relay", "beat", "migrate", "redis", "postgres"}
    assert configuration()["services"].keys() == core | {"engine", "agent", "worker"}
    assert configuration("gpu")["services"].keys() == core | {"engine-gpu", "agent-gpu", "worker-gpu"}
    watched = configuration("embedded", "observability")["services"].keys()
    assert watched == core | {"engine", "agent", "worker", "prometheus", "grafana"}


def test_every_process_of_ours_is_confined_and_every_image_is_pinned() -> None:
    whole = configuration(*PROFILES)
    assert whole["networks"]["inside"]["internal"] is True
    for name, service in whole["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d", tag), f"{name}: {service['image']}"
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if OURS.match(service["image"]):
            assert tag == __version__, name
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["networks"].keys() <= {"inside"} or name == "gateway", name
        assert "ports" not in service or service["ports"][0]["host_ip"] == "127.0.0.1", name
        for variable, value in (service.get("environment") or {}).items():
            assert "PASSWORD" not in variable or value.startswith("/run/secrets/"), name
            assert "://" not in value or value.startswith(("http://", "redis://redis:")), name


BUCKET = {
    "HSCR_BLOBS_URL": "s3://hscr/ward",
    "HSCR_S3_ENDPOINT": "https://s3.hospital.example:9000",
    "HSCR_S3_REGION": "us-east-1",
}


def test_with_a_bucket_what_reads_or_writes_bytes_knows_it_and_has_its_keys_as_files() -> None:
    files = (*ALONE, "deploy/object-store.yml")
    before = configuration(*PROFILES)["services"]
    after = configuration(*PROFILES, files=files, environment=BUCKET)["services"]
    changed = {name for name, service in after.items() if service != before[name]}
    assert changed == {
        "gateway", "agent", "agent-gpu", "worker", "worker-gpu", "worker-control", "hscr",
    }  # fmt: skip
    for name in changed:
        assert after[name]["environment"].items() >= BUCKET.items(), name
        assert "ACCESS_KEY" not in " ".join(after[name]["environment"]), name
        added = {each["source"] for each in after[name]["secrets"]}
        added -= {each["source"] for each in before[name]["secrets"]}
        assert added == {"hscr_s3_access_key_id", "hscr_s3_secret_access_key"}, name
        assert after[name]["networks"].keys() == before[name]["networks"].keys() | {"bucket"}, name


@pytest.mark.parametrize("own", [True, False])
def test_a_bucket_s_certificate_is_of_a_ca_that_is_named_or_that_the_machine_trusts(own: bool) -> None:
    authority = {"HSCR_S3_CA": "/etc/ssl/hospital-ca.crt"} if own else {}
    files = (*ALONE, "deploy/object-store.yml")
    gateway = configuration(files=files, environment=BUCKET | authority)["services"]["gateway"]
    path = gateway["environment"]["SSL_CERT_FILE"]
    (mount,) = (each for each in gateway["volumes"] if each["target"] == path)
    assert mount["source"] == authority.get("HSCR_S3_CA", "/etc/ssl/certs/ca-certificates.crt")
    assert mount["read_only"]


def test_a_bucket_without_a_name_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"HSCR_BLOBS_URL.*see \.env"):
        configuration(files=(*ALONE, "deploy/object-store.yml"))


def test_settings_of_a_bucket_that_are_left_empty_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file passes them on; AWS needs no endpoint."""
    files = (*ALONE, "deploy/object-store.yml")
    whole = configuration(files=files, environment={"HSCR_BLOBS_URL": "s3://hscr"})
    for name in BUCKET:
        monkeypatch.setenv(name, whole["services"]["agent"]["environment"][name])
    settings = StoreSettings()
    assert (settings.blobs_url, settings.s3_endpoint, settings.s3_region) == ("s3://hscr", None, None)


def test_the_first_key_is_made_of_the_secret_that_is_made_for_it(tmp_path: Path) -> None:
    """The script of the secrets and the command of the service, run on this machine."""
    subprocess.run([ROOT / "deploy" / "secrets.sh", tmp_path], check=True)
    migrate = configuration()["services"]["migrate"]
    (file,) = (each["source"] for each in migrate["secrets"] if each["source"] != "hscr_database_url")
    shell, option, script = migrate["command"]
    script = script.replace(f"/run/secrets/{file}", str(tmp_path / file))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    home = tmp_path / "home"
    surroundings = {**os.environ, "HSCR_HOME": str(home), "PATH": path}
    subprocess.run([shell, option, script], env=surroundings, check=True)
    with Store.open(StoreSettings(home=home)) as store:
        key = store.keys.verify((tmp_path / file).read_text())
    assert key is not None
    assert (key.role, key.train_consent) == (Role.OPERATOR, False)


def test_vllm_is_started_as_the_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_VLLM_COMMAND", sys.executable)
    serving = Serving(Path("/models/base"), "base", 8100, host="0.0.0.0", device="cuda", dtype="bfloat16")
    command = serving.command("vllm")
    engine = configuration("gpu")["services"]["engine-gpu"]
    assert engine["command"] == list(command.arguments[1:])
    assert command.environment.items() <= engine["environment"].items()
    assert f"`{engine['image'].rpartition(':')[2]}`" in (ROOT / "docs" / "vllm.md").read_text()


def test_the_dashboard_shows_metrics_that_exist() -> None:
    sources = "\n".join(
        (ROOT / "service" / name).read_text() for name in ("metrics.py", "embedded/metrics.py")
    )
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "hscr.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for name in set(re.findall(r"\b(?:hscr_|vllm:)\w+", shown)):
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", name)}"' in sources, name
