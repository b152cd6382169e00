"""`hscr up`: whole, watched, and gone without a trace. One stack; its end is tested last."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from hscr.processes import marked
from hscr.store.export.read import read_records
from tests.cli.running import Up, hscr, token_of
from tests.waiting import wait_until

PROCESSES = ["redis", "engine", "agent", "gateway", "relay", "worker-control", "worker-gpu", "beat"]


def test_all_processes_run_and_are_found_again(up: Up) -> None:
    assert list(up.at["processes"]) == PROCESSES
    token = token_of(up.at["processes"]["gateway"])
    assert set(up.at["processes"].values()) <= set(marked(token))


def test_ask_names_what_made_the_answer(up: Up, samples: Path) -> None:
    answer = up.json("ask", str(samples / "00.png"), "Is there a nodule?")
    assert answer["text"].split()[0].strip(",.") in {"Yes", "No"}
    assert answer["provenance"]["model"] == "phantom"
    assert answer["provenance"]["recipe"]["name"] == "raster@1"
    shown = up.run("ask", str(samples / "00.png"), "Is there a nodule?").stdout
    assert shown.startswith(answer["text"])
    assert "raster@1" in shown
    assert "research use only" in shown


def test_caption_answers(up: Up, samples: Path) -> None:
    assert up.json("caption", str(samples / "01.png"))["kind"] == "caption"


def test_dependence_shows_what_the_image_did_to_each_word(up: Up, samples: Path) -> None:
    answer = up.json("ask", str(samples / "00.png"), "Is there a nodule?")
    found = up.json("dependence", answer["id"])
    content = [token["difference"] for token in found["tokens"] if token["content"]]
    assert found["score"] == pytest.approx(sum(content) / len(content))
    assert (found["answer_id"], found["adapter"]) == (answer["id"], answer["provenance"]["adapter"])
    shown = up.run("dependence", answer["id"]).stdout
    assert f"{found['score']:+.3f} nats per content token" in shown
    assert all(f"{difference:+.3f}" in shown for difference in content)
    assert "no explanation" in shown
    unknown = up.run("dependence", "ans_none")
    assert unknown.returncode == 2
    assert "No answer ans_none" in unknown.stderr


def test_a_problem_is_one_line_and_its_remedy(up: Up, samples: Path) -> None:
    for arguments, words in (
        (["ask", str(samples / "00.png"), " "], "The question is empty"),
        (["ask", str(samples / "00.png"), "What?", "--adapter", "hscr@000000000000"], "hscr@000000000000"),
        (["rollback", "--reason", "none"], "no earlier version"),
        (["canary", "--end", "--reason", "none"], "does not run"),
        (["canary", "--reason", "none"], "Name a version"),
        (["generate", "--input", str(samples / "rows.jsonl")], "consent"),
    ):
        done = up.run(*arguments)
        assert done.returncode == 2, (arguments, done)
        problem, remedy = done.stderr.splitlines()
        assert words in problem
        assert remedy.startswith("→ ")


def test_generate_on_the_stack_then_export_and_read_back(
    up: Up, samples: Path, random_negatives: Path, tmp_path: Path
) -> None:
    rows = ["--input", str(samples / "rows.jsonl"), "--config", str(random_negatives)]
    (job,) = up.json("generate", *rows, "--consent", "--wait")
    assert job["state"] == "succeeded"
    exported = up.json("export", "--out", str(tmp_path / "out"), "--method", "random")
    records = [record for record, _, _ in read_records(tmp_path / "out" / "records.jsonl")]
    assert exported["records"] == len(records) > 0
    asked = [json.loads(line) for line in (samples / "rows.jsonl").read_text().splitlines()]
    known = {(row["question"], row["answer"]) for row in asked}
    assert {(record.question, record.chosen) for record in records} <= known
    assert {record.image_digest for record in records} == {
        path.stem for path in (tmp_path / "out" / "images").iterdir()
    }
    status = up.json("status")
    assert status["pointer"]["active"] is None
    assert status["jobs"][0]["id"] == job["id"]
    assert job["id"] in up.run("status").stdout
    assert job["id"] in up.run("jobs", "list", "--kind", "generate").stdout
    assert up.json("jobs", "list", "--state", "failed") == []
    refused = up.run("jobs", "retry", job["id"])
    assert (refused.returncode, "succeeded: there is nothing to repeat" in refused.stderr) == (2, True)


def test_doctor_finds_nothing_wrong(up: Up) -> None:
    checks = {check["name"]: check for check in up.json("doctor")}
    assert {name for name, check in checks.items() if check["status"] == "wrong"} == set()
    for name in ("Redis", "Database", "Engine", "Gateway"):
        assert checks[name]["status"] == "ok"


def test_a_second_stack_on_the_same_home_is_refused(up: Up) -> None:
    done = hscr("up", "--home", str(up.home), "--port", "0")
    assert done.returncode == 2
    assert "Another stack runs" in done.stderr
    assert up.run("status").returncode == 0


def test_kill_9_of_gateway_and_relay_is_survived(up: Up, samples: Path) -> None:
    before = up.pids()
    for name in ("gateway", "relay"):
        os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: all(up.pids()[name] not in {None, before[name]} for name in ("gateway", "relay")))
    wait_until(lambda: up.run("status").returncode == 0, seconds=60, what="the gateway's return")
    asked = lambda: up.run("ask", str(samples / "02.png"), "Is there a nodule?")  # noqa: E731
    wait_until(lambda: asked().returncode == 0, seconds=60, what="an answer")
    after = up.pids()
    assert {name for name in PROCESSES if after[name] != before[name]} == {"gateway", "relay"}


def test_ctrl_c_leaves_nothing_behind(up: Up, samples: Path) -> None:
    up.json("dependence", up.json("ask", str(samples / "00.png"), "Is there a mass?")["id"])
    token = token_of(up.pids()["gateway"])
    assert len(marked(token)) > len(PROCESSES), "the GPU child, at least, descends from them"
    assert up.stop() == 0
    assert marked(token) == []
    assert not (up.home / "stack.json").exists()
    for url in ("url", "engine_url", "redis_url"):
        port = int(up.at[url].split(":")[2].split("/")[0])
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
