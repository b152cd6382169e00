"""A whole suite into a folder."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hscr.ablate.findings import Findings
from hscr.ablate.measures import Finding
from hscr.ablate.report import markdown
from hscr.ablate.run import ablate
from hscr.ablate.suites import SuiteName
from hscr.cli.app import app
from hscr.errors import Conflict
from hscr.evaluate.metrics import kind_scores, score
from hscr.evaluate.suites import load_suite
from hscr.stack import PHANTOM
from tests.ablate.conftest import SMALL
from tests.cli.running import HSCR, clean_environment
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(out: Path) -> Findings:
    (found,) = ablate(PHANTOM, [SuiteName.SOURCE], SMALL, 1, out)
    return found


def test_the_results_are_read_back(found: Findings, out: Path) -> None:
    assert Findings.model_validate_json((out / "source" / "results.json").read_bytes()) == found
    assert (out / "source" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_kept_answers(found: Findings, out: Path) -> None:
    runs = [json.loads(path.read_bytes()) for path in (out / "arms").glob("*.json")]
    (external,) = (run for run in runs if run["identity"].get("negatives") == "external")
    suite = load_suite(SMALL.loop.evaluate)
    kinds = kind_scores([score(item, external["answers"][item.id]) for item in suite.items])
    told = next(arm for arm in found.arms if arm.name == "external")
    assert told.scores["macro_score"].mean == pytest.approx(sum(kinds.values()) / len(kinds))
    assert told.scores["closed"].mean == pytest.approx((kinds["abnormal"] + kinds["presence"]) / 2)
    assert told.seeds[0].scores["closed"] == pytest.approx(told.scores["closed"].mean)


def test_a_difference_is_that_of_the_scores(found: Findings) -> None:
    method = found.arms[-1]
    assert (method.name, method.differences) == ("hscr", {})
    for arm in found.arms[:-1]:
        gap = arm.differences["macro_score"].mean
        assert gap == pytest.approx(arm.scores["macro_score"].mean - method.scores["macro_score"].mean)


def test_the_model_thinks_its_own_answers_more_probable(found: Findings) -> None:
    """Figure 1a of the paper, on phantoms too."""
    (claim,) = (each for each in found.orderings if each.claim.metric == "probability")
    assert claim.finding == Finding.AGREES


def test_the_table_names_every_arm_ordering_and_count(found: Findings) -> None:
    text = markdown(found, "plot.png")
    for arm in found.arms:
        assert f"| {arm.label} |" in text
    for each in found.orderings:
        assert f"| {each.finding} |" in text
    assert f"| {found.arms[-1].seeds[0].records} |" in text
    assert f"{found.questions} questions about {found.images} images" in text


def test_progress_ends_at_the_number_of_arms(out: Path, found: Findings) -> None:
    told: list[tuple[float, int]] = []

    def follow(done: float, total: int, _what: str) -> None:
        told.append((done, total))

    again = ablate(PHANTOM, [SuiteName.SOURCE], SMALL, 1, out, on_progress=follow)
    assert again == [found]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # nothing was run: no fraction of an arm


def without(found: Findings, out: Path, folder: Path, *arms: str) -> list[Path]:
    """A copy of the run in which these arms have not been run; their files."""
    shutil.copytree(out / "arms", folder / "arms")
    missing = [arm.seeds[0].digest for arm in found.arms if arm.name in arms]
    paths = [folder / "arms" / f"{digest[:24]}.json" for digest in missing]
    for path in paths:
        path.unlink()
    return paths


def test_a_killed_run_goes_on_to_the_same_results(found: Findings, out: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "out", tmp_path / "small.toml"
    base, external = without(found, out, folder, "base", "external")
    config.write_text(
        'extends = "phantom"\nfinetune.batch_size = 4\n'
        "evaluate.dependence_questions = 4\nevaluate.dependence_masks = 1\n"
    )
    size = ["--seeds", "1", "--images", "3", "--records", "24", "--steps", "3", "--mix", "traffic"]
    command = ["ablate", "--suite", "source", *size, "--config", str(config), "--out", str(folder)]
    environment = clean_environment(OMP_NUM_THREADS="1")
    with subprocess.Popen([*HSCR, *command, "--resume"], env=environment, stderr=subprocess.DEVNULL) as run:
        wait_until(base.is_file, seconds=120, what="the first arm")
        run.send_signal(signal.SIGKILL)
    assert not external.exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("arms/*.json")}

    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, Conflict)
    resumed = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert resumed.exit_code == 0, resumed.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(resumed.stdout) == [found.model_dump(mode="json")]


def test_arms_may_run_in_processes_of_their_own(found: Findings, out: Path, tmp_path: Path) -> None:
    (method,) = without(found, out, tmp_path / "out", "hscr")
    assert ablate(PHANTOM, [SuiteName.SOURCE], SMALL, 1, tmp_path / "out", jobs=2) == [found]
    assert method.is_file()
