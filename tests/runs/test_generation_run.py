"""A generation run over a data set: killed, resumed, refused, and what it says of rows without a record."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hscr.config import DegradeConfig, FinetuneConfig, GenerateConfig, SubstituteConfig
from hscr.errors import AdapterRefused, Conflict, InvalidCheckpoint, InvalidConfig, InvalidRecord, NotFound
from hscr.models.vlm import VLM
from hscr.parquet import write_table
from hscr.records import Change, PreferenceRecord, Response, Substitution
from hscr.rows.row import Row, Why
from hscr.rows.source import RowSource, open_rows
from hscr.runs.canonical import CREATED, SCHEMA, VERSION, Stored, read_part, to_row
from hscr.runs.folder import open_run
from hscr.runs.produce import Skip
from hscr.runs.run import RunOptions, generate_records
from hscr.runs.summary import Summary
from hscr.stack import PHANTOM
from hscr.store.blobs import folder_digest
from hscr.store.export.read import read_records
from tests.cli.running import HSCR, clean_environment
from tests.runs.conftest import write_rows
from tests.waiting import wait_until

CONFIG = GenerateConfig(substitute=SubstituteConfig(negatives="random"))
SMALL = RunOptions(shard_size=4, batch_size=2)
RESUME = RunOptions(resume=True, shard_size=4, batch_size=2)


def run(model: Path, rows: Path, out: Path, options: RunOptions = SMALL, **more: Any) -> Summary:
    config = more.pop("config", CONFIG)
    return generate_records(model, open_rows(str(rows)), out, config, options=options, **more)


def parts(out: Path) -> list[Path]:
    return sorted((out / "records").glob("part-*.parquet"))


def content(out: Path) -> list[Any]:
    """All that a run says, shard by shard: columns, images' bytes included, and skips."""
    tables = [pq.read_table(part) for part in parts(out)]
    skips = [pq.read_metadata(part).metadata[b"hscr.skips"] for part in parts(out)]
    return [*(table.to_pylist() for table in tables), *skips, (out / "skipped.jsonl").read_text()]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows in `input` and their whole run in `out`; to be copied by who changes it."""
    folder = tmp_path_factory.mktemp("finished")
    run(model, write_rows(folder / "input"), folder / "out")
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copied")


def start(model: Path, rows: Path, out: Path) -> "subprocess.Popen[bytes]":
    shape = ["--shard-size", "4", "--batch-size", "2", "--device", "cpu", "--model", str(model)]
    config = rows.parent / "loop.toml"
    config.write_text('[generate.substitute]\nnegatives = "random"\n')
    files = ["--input", str(rows), "--out", str(out), "--config", str(config)]
    return subprocess.Popen([*HSCR, "generate", *files, *shape], env=clean_environment(OMP_NUM_THREADS="1"))


def replace_by_pipe(image: Path) -> bytes:
    """Reading the image now blocks for ever: where a run stands still is where we say."""
    data = image.read_bytes()
    image.unlink()
    os.mkfifo(image)
    return data


def give_back(image: Path, data: bytes) -> None:
    image.unlink()
    image.write_bytes(data)


def test_killed_and_resumed_is_the_same_as_never_killed(
    model: Path, finished: Path, rows: Path, tmp_path: Path
) -> None:
    out, in_third = tmp_path / "killed", rows.parent / "9.png"
    original = replace_by_pipe(in_third)
    killed = start(model, rows, out)
    wait_until(lambda: len(parts(out)) == 2, seconds=90, what="the second shard")
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    give_back(in_third, original)
    assert len(parts(out)) == 2
    assert not (out / "summary.json").exists()
    for folder in (out, out / "records"):
        with pytest.raises(Conflict, match="has not finished"):
            list(read_records(folder))
    assert list(read_records(parts(out)[0]))
    written = {part: part.stat().st_mtime_ns for part in parts(out)}

    resumed = run(model, rows, out, RESUME)
    assert content(out) == content(finished / "out")
    assert resumed == Summary.model_validate_json((finished / "out" / "summary.json").read_text())
    assert resumed.rows == 16
    assert resumed.records > 8
    assert {part: part.stat().st_mtime_ns for part in parts(out)[:2]} == written
    assert [path.name for path in (out / "records").iterdir() if path.suffix == ".part"] == []


def test_a_finished_run_resumes_to_itself(model: Path, copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in parts(copied / "out")}
    told = (copied / "out" / "summary.json").read_text()
    again = run(model, copied / "input" / "rows.jsonl", copied / "out", RESUME)
    assert again == Summary.model_validate_json(told)
    assert {path: path.stat().st_mtime_ns for path in parts(copied / "out")} == before


def test_resuming_with_other_settings_names_what_differs(model: Path, copied: Path) -> None:
    rows, out = copied / "input" / "rows.jsonl", copied / "out"
    other = CONFIG.model_copy(update={"seed": 1, "degrade": DegradeConfig(rate=0.5)})
    with pytest.raises(Conflict, match=r"config\.degrade\.rate was 0\.7, is 0\.5; config\.seed was 0, is 1"):
        run(model, rows, out, RESUME, config=other)
    with pytest.raises(Conflict, match="rows was 16, is 12"):
        run(model, rows, out, RunOptions(resume=True, shard_size=4, batch_size=2, limit=12))
    rows.write_text(rows.read_text().replace("nodule", "stone"))
    with pytest.raises(Conflict, match="input_digest was"):
        run(model, rows, out, RESUME)


def test_a_folder_that_is_not_empty_is_left_alone(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(Conflict, match="--resume"):
        run(model, rows, tmp_path)
    with pytest.raises(Conflict, match="holds no run"):
        run(model, rows, tmp_path, RESUME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "mine"]


def test_a_folder_is_written_by_one_process_at_a_time(model: Path, rows: Path, tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "out", resume=False),
        pytest.raises(Conflict, match="Another process"),
        open_run(tmp_path / "out", resume=True),
    ):
        pass


def test_a_shard_lost_from_the_middle_is_noticed(model: Path, copied: Path) -> None:
    parts(copied / "out")[1].unlink()
    with pytest.raises(Conflict, match=r"part-00001\.parquet is missing"):
        run(model, copied / "input" / "rows.jsonl", copied / "out", RESUME)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"started_at": "then"}', "\xff"])
def test_a_damaged_run_json_is_named(model: Path, copied: Path, text: str) -> None:
    (copied / "out" / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(Conflict, match=r"run\.json is damaged"):
        run(model, copied / "input" / "rows.jsonl", copied / "out", RESUME)
    with pytest.raises(Conflict, match=r"run\.json is damaged"):
        list(read_records(copied / "out"))


def test_a_damaged_shard_is_named_and_once_deleted_made_again(
    model: Path, finished: Path, copied: Path
) -> None:
    rows, out = copied / "input" / "rows.jsonl", copied / "out"
    last = parts(out)[-1]
    pq.write_table(pq.read_table(last), last)  # without what a shard says of itself
    for _ in range(2):
        with pytest.raises(Conflict, match=rf"{last.name} cannot be read"):
            run(model, rows, out, RESUME)
        last.write_bytes(last.read_bytes()[:2000])
    last.unlink()
    run(model, rows, out, RESUME)
    assert content(out) == content(finished / "out")


def test_a_finished_run_that_lost_a_shard_is_unfinished_while_it_is_made_again(
    model: Path, copied: Path
) -> None:
    parts(copied / "out")[-1].unlink()

    def stop(done: int, _total: int) -> None:
        if done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, copied / "input" / "rows.jsonl", copied / "out", RESUME, on_progress=stop)
    with pytest.raises(Conflict, match="has not finished"):
        list(read_records(copied / "out"))


def test_rows_without_a_record_are_told_by_id_and_never_stop_a_run(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    good = json.loads(rows.read_text().splitlines()[0])
    (rows.parent / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    listed: list[Any] = [
        good,
        "{",
        {**good, "id": "text", "image": None},
        {**good, "id": "gone", "image": "none.png"},
        {**good, "id": "broken", "image": "broken.png"},
        {**good, "id": "silent", "answer": ""},
        good,
        {**good, "id": "control", "question": "what is <image>?"},
        {**good, "id": None, "question": "which organ?"},
        {**good, "id": None, "question": "which organ?"},
        {**good, "id": "last"},
    ]
    rows.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in listed))
    summary = run(model, rows, tmp_path / "out")
    skips = [Skip.model_validate_json(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert [(skip.row, skip.place, skip.why) for skip in skips] == [
        (1, "line 2", Why.MALFORMED),
        (2, "line 3", Why.TEXT_ONLY),
        (3, "line 4", Why.MISSING_IMAGE),
        (4, "line 5", Why.UNREADABLE_IMAGE),
        (5, "line 6", Why.EMPTY_ANSWER),
        (6, "line 7", Why.DUPLICATE_ID),
        (7, "line 8", Why.NO_RECORD),
        (9, "line 10", Why.DUPLICATE_ID),
    ]
    assert [skip.id for skip in skips[:7]] == [None, "text", "gone", "broken", "silent", "q0", "control"]
    records = [stored.record for stored in read_records(tmp_path / "out")]
    assert [record.source for record in records] == ["q0", skips[7].id, "last"]
    assert (summary.rows, summary.records, summary.skipped) == (11, 3, 8)
    assert summary.skipped_by["duplicate-id"] == 2
    assert list(summary.no_record_by) == [skips[6].reason]
    page = (tmp_path / "out" / "summary.html").read_text()
    assert "duplicate-id" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_duplicate_of_an_earlier_run_s_row_is_still_a_duplicate(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:5], lines[0]]))
    run(model, rows, tmp_path / "out")
    parts(tmp_path / "out")[1].unlink()
    run(model, rows, tmp_path / "out", RESUME)
    (skip,) = [Skip.model_validate_json(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert (skip.row, skip.id, skip.why) == (5, "q0", Why.DUPLICATE_ID)


def test_no_more_rows_are_read_than_a_batch_needs(model: Path, rows: Path, tmp_path: Path) -> None:
    source = open_rows(str(rows))
    read, known = 0, 0
    ahead: list[int] = []

    def counted() -> Any:
        nonlocal read
        for row in source.read():
            read += 1
            yield row

    def progress(done: int, _total: int) -> None:
        nonlocal known
        known = done
        ahead.append(read - done)

    generate_records(
        model, RowSource(source.digest, source.count, counted), tmp_path / "out", CONFIG,
        options=SMALL, on_progress=progress,
    )  # fmt: skip
    assert (read, known) == (16, 16)
    assert max(ahead) <= 2


def test_the_store_is_read_by_datasets_with_images_and_back_as_records(
    finished: Path, tmp_path: Path
) -> None:
    out = finished / "out"
    files, cache = [str(part) for part in parts(out)], str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    stored = list(read_records(out))
    assert len(loaded) == len(stored) > 8
    row, (record, png, metadata) = loaded[0], stored[0]
    assert isinstance(row["images"][0], Image.Image)
    assert row["images"][0].size == (40, 40)
    assert [each["level"] for each in row["responses"]] == list(range(1, len(record.rejected) + 1))
    assert [each["text"] for each in row["responses"]] == [each.text for each in record.rejected]
    assert hashlib.sha256(png).hexdigest() == record.image_digest
    assert metadata == {"answer_type": "OPEN"}
    about = json.loads((out / "run.json").read_text())
    assert record.created_at.isoformat() == about["started_at"]
    assert about["identity"]["config"] == CONFIG.resolved()
    summary = json.loads((out / "summary.json").read_text())
    assert about["counts"]["records_digest"] == summary["records_digest"]
    assert about["counts"]["records"] == len(stored)
    metadata_of_file = pq.read_metadata(files[0]).metadata
    assert metadata_of_file[b"hscr.schema_version"] == b"1"
    assert json.loads(metadata_of_file[b"hscr.identity"]) == about["identity"]


def test_a_record_keeps_every_field(tmp_path: Path) -> None:
    """Through Parquet and back, a record with all its optional fields set, and one with none."""
    change = Change(position=2, old_id=None, new_id=9)
    substitution = Substitution(position=1, old_id=5, new_id=7, sensitivity=0.25, contrast_probability=0.5)
    shared = {"text": "left", "similarity": 0.5, "mean_probability": 0.1}
    plain = PreferenceRecord(
        id="pref_1", image_digest="a" * 64, study="s", question="Où ?", chosen="right", source="row_1",
        rejected=(Response(**shared),), method="hscr", model_digest="m", config_digest="c", consent=True,
    )  # fmt: skip
    full = plain.but(
        id="pref_2", adapter="local@0", numeric_mode="cpu/float32", seed=3, embedder="e@1", job_id="job_1",
        rejected=(Response(**shared, substitutions=(substitution,), changes=(change,)),),
    )  # fmt: skip
    stored = [Stored(plain, b"png", {}), Stored(full, b"png", {"answer_type": "OPEN"})]
    metadata = {VERSION: "1", CREATED: "2026-01-01T00:00:00+00:00"}
    write_table(tmp_path / "part.parquet", SCHEMA, map(to_row, stored), lambda: metadata)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    assert list(read_part(tmp_path / "part.parquet")) == [
        each._replace(record=each.record.but(created_at=moment)) for each in stored
    ]
    assert [each.png for each in read_part(tmp_path / "part.parquet", images=False)] == [b"", b""]


def test_records_of_another_schema_are_refused(finished: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(parts(finished / "out")[0]), tmp_path / "other.parquet")
    with pytest.raises(InvalidRecord, match="schema unknown"):
        list(read_part(tmp_path / "other.parquet"))
    (tmp_path / "other.parquet").write_bytes(b"not Parquet")
    with pytest.raises(InvalidRecord, match="cannot be read as Parquet"):
        list(read_part(tmp_path / "other.parquet"))


def test_a_row_may_withhold_its_consent(model: Path, rows: Path, tmp_path: Path) -> None:
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    kept_back = given[0]["id"]
    given[0]["consent"] = False
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    run(model, rows, tmp_path / "out")
    consent = {stored.record.source: stored.record.consent for stored in read_records(tmp_path / "out")}
    assert consent.pop(kept_back) is False
    assert consent
    assert all(consent.values())


def test_an_adapter_is_named_by_its_digest(model: Path, rows: Path, tmp_path: Path) -> None:
    vlm = VLM.load(model)
    with vlm.with_lora(FinetuneConfig(rank=2)):
        vlm.adapters.save("trainee", tmp_path / "adapter")
    run(model, rows, tmp_path / "out", RunOptions(limit=2), adapter=tmp_path / "adapter")
    digest = folder_digest(tmp_path / "adapter")
    assert {record.adapter for record, _, _ in read_records(tmp_path / "out")} == {f"local@{digest[:12]}"}
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["identity"]["adapter_digest"] == digest


def test_a_row_may_bring_its_image_as_bytes(model: Path, rows: Path, tmp_path: Path) -> None:
    image = (rows.parent / "3.png").read_bytes()
    row = Row("row 1", image, "is there a nodule?", "yes, there is a small nodule.")
    source = RowSource("digest", 1, lambda: iter([row]))
    generate_records(model, source, tmp_path / "out", CONFIG)
    (stored,) = read_records(tmp_path / "out")
    assert stored.record.source.startswith("row_")
    assert stored.record.study.startswith("local-")


def test_compiled_steps_make_the_same_records_and_are_named_in_them(rows: Path, tmp_path: Path) -> None:
    config = GenerateConfig.parse(
        {"substitute": {"mode": "decoded", "candidates": 2, "max_tokens": 12}, "rerank": {"gap": 0.0}}
    )
    made = {}
    for compiled in (False, True):
        options = RunOptions(shard_size=4, batch_size=2, compiled=compiled, device="cpu")
        run(PHANTOM, rows, tmp_path / str(compiled), options, config=config)
        made[compiled] = [record for record, _, _ in read_records(tmp_path / str(compiled))]
    assert made[True]
    assert [record.rejected for record in made[True]] == [record.rejected for record in made[False]]
    assert {record.numeric_mode for record in made[False]} == {"cpu/float32"}
    assert {record.numeric_mode for record in made[True]} == {"cpu/float32, compiled"}


def test_a_mode_without_steps_is_not_compiled(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="Mode teacher_forced has no steps to compile"):
        run(model, rows, tmp_path / "out", RunOptions(compiled=True))
    assert not (tmp_path / "out").exists(), "the same folder can be used without it"


@pytest.mark.parametrize("refused", ["embedder", "adapter"])
def test_what_is_refused_leaves_the_folder_to_be_used(
    model: Path, rows: Path, tmp_path: Path, refused: str
) -> None:
    rerank = {"similarity": "sentence_embedding", "embedder": str(tmp_path / "nope")}
    (tmp_path / "adapter_config.json").write_text("{}")
    wrong: dict[str, Any] = {
        "embedder": {"config": GenerateConfig.parse({"rerank": rerank})},
        "adapter": {"adapter": tmp_path},
    }[refused]
    with pytest.raises((InvalidConfig, AdapterRefused)):
        run(model, rows, tmp_path / "out", **wrong)
    assert run(model, rows, tmp_path / "out", RunOptions(limit=2)).rows == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:500])])
def test_an_incomplete_model_is_named(
    model: Path, rows: Path, tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    damage(broken / file)
    with pytest.raises((NotFound, InvalidCheckpoint), match=re.escape(str(broken))):
        run(broken, rows, tmp_path / "out")
