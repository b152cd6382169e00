"""One arm, run for real on the embedded model."""

from dataclasses import replace
from pathlib import Path

import pytest

from hscr.ablate.bench import Bench
from hscr.ablate.results import ArmRun
from hscr.ablate.suites import BASE, HSCR, SUITES
from hscr.config import GateConfig
from hscr.errors import Conflict, InvalidRecord
from hscr.models.phantom.probe import evaluate
from hscr.stack import PHANTOM

ARMS = {arm.name: arm for suite in SUITES.values() for arm in suite.arms}


def outcome(run: ArmRun) -> dict[str, object]:
    return run.model_dump(exclude={"seconds"})


def files(bench: Bench) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*.json")}


def test_an_arm_is_deterministic(bench: Bench, elsewhere: Bench) -> None:
    assert outcome(bench.run(ARMS[HSCR], 0)) == outcome(elsewhere.run(ARMS[HSCR], 0))


def test_training_changes_what_the_model_says_and_seeds_differ(bench: Bench) -> None:
    base, first, second = bench.run(BASE, 0), bench.run(ARMS[HSCR], 0), bench.run(ARMS[HSCR], 1)
    assert len({run.digest for run in (base, first, second)}) == 3
    assert base.dependence != first.dependence != second.dependence
    assert first.probability.keys().isdisjoint(second.probability)
    assert base.records == 0
    assert first.records + sum(first.skipped.values()) == bench.setting.records


def test_the_base_model_answers_as_under_the_models_own_forward_pass(bench: Bench) -> None:
    """Another loop over transformers' plain model, by its author's probe."""
    asked = bench.setting.loop.evaluate
    report = evaluate(PHANTOM, split=asked.split, images=asked.images, seed=asked.seed, views=("full",))
    answers = {outcome.example.id: outcome.text for outcome in report.outcomes["full"]}
    assert bench.run(BASE, 0).answers == answers


def test_an_arm_is_not_run_again(bench: Bench) -> None:
    first = bench.run(ARMS[HSCR], 0)
    before = files(bench)
    assert bench.run(ARMS[HSCR], 0) == first
    assert files(bench) == before
    path = bench.folder / "arms" / f"{first.digest[:24]}.json"
    told = first.but(answers=dict.fromkeys(first.answers, "As kept."))
    path.write_text(told.model_dump_json())
    assert bench.run(ARMS[HSCR], 0) == told
    path.unlink()
    assert outcome(bench.run(ARMS[HSCR], 0)) == outcome(first)


def test_arms_that_differ_in_training_share_their_records(bench: Bench) -> None:
    method = bench.run(ARMS[HSCR], 0)
    before = files(bench)
    explicit = bench.run(ARMS["explicit"], 0)
    made = [path for path in files(bench) if path not in before]
    assert [path.parent.name for path in made] == ["arms"]
    assert explicit.probability == method.probability
    assert explicit.digest != method.digest


@pytest.mark.parametrize(
    ("change", "same"), [({"gate": GateConfig(resamples=100)}, True), ({"split": "test"}, False)]
)
def test_an_arms_identity_is_what_its_answers_depend_on(
    bench: Bench, change: dict[str, object], same: bool
) -> None:
    loop = bench.setting.loop
    asked = loop.evaluate.model_copy(update=change)
    setting = bench.setting.model_copy(update={"loop": loop.model_copy(update={"evaluate": asked})})
    other = replace(bench, setting=setting)
    for arm in (BASE, ARMS[HSCR]):
        assert (other.identity(arm, 0) == bench.identity(arm, 0)) is same


def test_answers_by_somebody_else_are_trained_on(bench: Bench) -> None:
    run = bench.run(ARMS["external"], 0)
    assert run.records == bench.setting.records
    assert run.dependence != bench.run(BASE, 0).dependence


def test_a_damaged_file_is_named(elsewhere: Bench) -> None:
    elsewhere.run(BASE, 0)
    (path,) = elsewhere.folder.rglob("*.json")
    path.write_text('{"answers"')
    with pytest.raises(Conflict, match=path.name):
        elsewhere.run(BASE, 0)


def test_an_arm_without_records_is_named(elsewhere: Bench) -> None:
    scarce = replace(elsewhere, setting=elsewhere.setting.model_copy(update={"records": 1}))
    with pytest.raises(
        InvalidRecord, match=r"Arm hscr, seed 0: no question gave a record\. .*Raise --records"
    ):
        scarce.run(ARMS[HSCR], 0)
