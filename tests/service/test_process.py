"""The gateway as its own process: it starts, logs without patients, drains and ends."""

import json
import signal
import subprocess
import sys
from contextlib import suppress

import httpx2

from hscr.records import Role
from tests.redis_server import free_port
from tests.service.conftest import IMAGE, QUESTION, b64, equip, replica
from tests.waiting import wait_until


def test_a_process_serves_logs_no_patient_and_ends_on_sigterm(settings, store, engine):
    equip(store, engine)
    secret = store.keys.create("k", Role.CLIENT)[1]
    port = free_port()
    environment = {"HSCR_HOME": str(settings.home), "HSCR_REPLICAS_SEEN": "3600", "PATH": "/usr/bin"}
    command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            def ready() -> bool:
                with suppress(httpx2.TransportError):
                    return client.get("/readyz").status_code == 200
                assert process.poll() is None, process.communicate()
                return False

            wait_until(ready, what="readiness")
            headers = {"Authorization": f"Bearer {secret}"}
            body = {
                "image": b64(IMAGE),
                "question": QUESTION,
                "study": "s-jane",
                "sampling": {"max_tokens": 8},
            }
            answered = client.post("/v1/vqa", json=body, headers=headers)
            assert answered.status_code == 200
            form = {"data": {"question": QUESTION}, "files": {"image": ("Doe-Jane.png", b"broken")}}
            assert client.post("/v1/vqa", headers=headers, **form).status_code == 415
            store.releases.report_replica(replica("http://127.0.0.1:9"))
            wait_until(lambda: client.post("/v1/vqa", json=body, headers=headers).status_code == 503)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["status"] for line in requests if line["route"] == "/v1/vqa"} == {200, 415, 503}
    answered_line = next(line for line in lines if line["event"] == "answered")
    assert answered_line["answer"] == answered.json()["id"]
    assert answered_line["request_id"] == answered.headers["x-request-id"]
    everything = out + err
    for private in (QUESTION, answered.json()["text"], secret, "Jane", "jane", b64(IMAGE)[:40]):
        assert private not in everything


def test_a_database_that_was_never_made_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "service"], env={"HSCR_HOME": str(tmp_path), "PATH": "/usr/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "hscr db upgrade" in done.stderr
