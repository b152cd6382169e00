"""The alignment benchmark on a few questions: what its arms share, and that it says what was measured."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import align
from benchmarks.aligning.arms import ARMS, DPO, RANDOM, VIEWS, AlignBench, judged
from hscr.ablate.run import Task
from hscr.ablate.sources import Asked
from hscr.ablate.suites import HSCR
from hscr.models.phantom.language import parse_answer
from hscr.records import PreferenceRecord

OPTIONS = Namespace(seeds=1, jobs=1, records=40, steps=1, images=3, dependence=2, nll_weight=5.0, plot=None)


class Ran(Namespace):
    lines: list[dict]
    benches: dict[str, AlignBench]
    done: dict[str, align.Done]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The whole benchmark, run once."""
    options = Namespace(**vars(OPTIONS), out=tmp_path_factory.mktemp("align"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept = Ran()

    def on_seed(benches: dict[str, AlignBench], done: dict[str, align.Done], seeds: int) -> None:
        kept.lines = align.write(benches, done, seeds, options)
        kept.benches, kept.done, kept.options = benches, done, options

    align.measure(options, on_seed)
    torch.set_num_threads(threads)
    return kept


@pytest.fixture(scope="module")
def sources(ran: Ran) -> dict[str, list[Asked]]:
    """What each setting starts from."""
    return {name: bench._sources(0) for name, bench in ran.benches.items()}


Records = tuple[PreferenceRecord, ...]


@pytest.fixture(scope="module")
def made(ran: Ran, sources: dict[str, list[Asked]]) -> dict[tuple[str, str], Records]:
    """By setting and arm, what it was trained on."""
    return {
        (setting, arm.name): bench._made(
            arm, bench.setting.arm(arm, 0).generate, 0, sources[setting], lambda _share: None
        ).records
        for setting, bench in ran.benches.items()
        for arm in ARMS
        if arm.name in {HSCR, RANDOM, DPO}
    }


@pytest.mark.parametrize("setting", align.SETTINGS)
def test_arms_share_questions_and_preferred_answers(
    ran: Ran, made: dict[tuple[str, str], Records], setting: str
) -> None:
    method = made[setting, HSCR]
    asked = [(record.id, record.question, record.chosen) for record in method]
    for name in (RANDOM, DPO):
        assert [(record.id, record.question, record.chosen) for record in made[setting, name]] == asked
    runs = ran.done[setting]
    assert {runs[arm.name, 0].records for arm in ARMS[1:]} == {len(method)}
    budgets = {json.dumps({**runs[arm.name, 0].identity}.get("steps")) for arm in ARMS[1:]}
    assert budgets == {"1"}


def test_dpo_has_the_most_dispreferred_answer_alone(made: dict[tuple[str, str], Records]) -> None:
    assert any(len(record.rejected) > 1 for record in made["online", HSCR])
    for whole, pair in zip(made["online", HSCR], made["online", DPO], strict=True):
        assert pair.rejected == (min(whole.rejected, key=lambda answer: answer.similarity),)


def test_random_negatives_answer_other_questions_of_the_kind(
    sources: dict[str, list[Asked]], made: dict[tuple[str, str], Records]
) -> None:
    asked = {each.source.id: each for each in sources["online"]}
    drawn = [record for record in made["online", RANDOM] if record.method == RANDOM]
    assert drawn
    for record in drawn:
        kind = asked[record.source].example.kind
        others = {e.source.chosen for e in asked.values() if e.example.kind == kind} - {record.chosen}
        assert {answer.text for answer in record.rejected} <= others
        right = parse_answer(kind, record.chosen)
        assert right not in {parse_answer(kind, answer.text) for answer in record.rejected}
        ranks = [answer.similarity for answer in record.rejected]
        assert ranks == sorted(ranks, reverse=True)


def test_the_reviewer_leaves_right_answers_and_corrects_wrong_ones(sources: dict[str, list[Asked]]) -> None:
    (first, *_), asked = sources["online"], sources["online"]
    assert len(asked) == OPTIONS.records
    for each in asked:
        right = parse_answer(each.example.kind, each.example.answer)
        assert parse_answer(each.example.kind, each.source.chosen) == right
    assert judged(first, first.example.answer.upper()).source.chosen == first.example.answer.upper()
    assert judged(first, "Nothing of the kind.").source.chosen == first.example.answer


def test_training_moves_every_arm_and_views_are_told_apart(ran: Ran) -> None:
    for runs in ran.done.values():
        base = runs["base", 0]
        for arm in ARMS[1:]:
            assert runs[arm.name, 0].dependence != base.dependence
        assert set(base.views) == set(VIEWS)
        blank = base.views["blank"]
        assert blank != base.answers
        assert base.views["dropped"] != base.answers != base.views["swapped"]
    # The base model is the same in both settings, and run once.
    assert ran.done["paper"]["base", 0] == ran.done["online"]["base", 0]


def test_a_line_per_setting_pairs_each_arm_with_the_base(ran: Ran) -> None:
    assert [line["setting"] for line in ran.lines] == ["paper", "online"]
    for line in json.loads(json.dumps(ran.lines)):
        assert line["seeds"] == 1
        assert line["questions"] > line["images"] == 3
        base = line["arms"]["base"]["macro_score"]["mean"]
        for arm in ARMS[1:]:
            macro = line["arms"][arm.name]["macro_score"]
            assert macro["minus_base"] == pytest.approx(macro["mean"] - base, abs=2e-4)
            low, high = macro["ci95"]
            assert low <= high
            assert macro["by_seed"] == [macro["minus_base"]]
            accuracy = {view: line["arms"][arm.name][f"accuracy_{view}"]["mean"] for view in VIEWS}
            gap = line["arms"][arm.name]["accuracy"]["mean"] - accuracy["dropped"]
            assert line["arms"][arm.name]["dropped_gap"]["mean"] == pytest.approx(gap, abs=2e-4)


def test_a_run_goes_on_where_it_was(ran: Ran) -> None:
    bench, (task, lost) = ran.benches["online"], (Task(ARMS[1], 0), Task(ARMS[2], 0))
    arms = ran.options.out / "arms"
    files = {path.name: path.stat().st_mtime_ns for path in arms.iterdir()}
    told = ran.done["online"][lost.arm.name, 0]
    (arms / f"{told.digest[:24]}.json").unlink()
    assert bench.has_run(*task)
    assert not bench.has_run(*lost)
    again = bench.run(*lost)
    assert again.model_dump(exclude={"seconds"}) == told.model_dump(exclude={"seconds"})
    after = {path.name: path.stat().st_mtime_ns for path in arms.iterdir()}
    assert {name for name in after if after[name] != files.get(name)} == {f"{told.digest[:24]}.json"}


def test_tables_and_plot_are_written(ran: Ran) -> None:
    out: Path = ran.options.out
    for setting in align.SETTINGS:
        table = (out / f"{setting}.md").read_text()
        assert all(arm.label in table for arm in ARMS)
    assert (out / "align.png").stat().st_size > 1000
