"""From sources to records, on a model (algorithms §6: 12; design invariant 9)."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from hscr.config import FinetuneConfig, GenerateConfig
from hscr.contrast.agree import agree
from hscr.contrast.dependence import Said, visual_dependence
from hscr.contrast.generate import Skipped, generate
from hscr.contrast.rerank import words
from hscr.contrast.substitute import Edit
from hscr.errors import InvalidRecord, JobCancelled, NotFound
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord, PreferenceSource, Substitution
from tests.tiny_llava import picture

OPEN = {"plausibility": 0.0, "full_plausibility": 0.0, "min_probability": 0.0}
CONFIG = GenerateConfig.parse({"substitute": OPEN})
ANSWERS = ["yes, left", "a small nodule in the left lung", "the right kidney", "no", "brain mr with a stone"]


def sources(count: int = 10) -> list[tuple[PreferenceSource, Image.Image]]:
    return [
        (
            PreferenceSource(
                id=f"fb_{i}",
                image_digest=f"image{i // 2}",
                study="s",
                question=["is it?", "what does this image show, left or right?"][i % 2],
                chosen=ANSWERS[i % len(ANSWERS)],
                consent=True,
            ),
            picture(i // 2),
        )
        for i in range(count)
    ]


def records(outcomes: Iterable[PreferenceRecord | Skipped]) -> list[PreferenceRecord]:
    return [outcome for outcome in outcomes if isinstance(outcome, PreferenceRecord)]


def content(record: PreferenceRecord) -> dict[str, object]:
    return record.model_dump(exclude={"created_at"})


@pytest.fixture(scope="module")
def made(vlm: VLM) -> list[PreferenceRecord | Skipped]:
    return list(generate(vlm, sources(), CONFIG))


def test_every_source_has_one_outcome_in_order(made: list[PreferenceRecord | Skipped]) -> None:
    names = [getattr(one, "source", None) or one.source_id for one in made]
    assert names == [source.id for source, _ in sources()]
    assert len(records(made)) >= 8


def test_12_candidates_are_distinct_differ_from_the_answer_and_retokenise(
    vlm: VLM, made: list[PreferenceRecord | Skipped]
) -> None:
    for record in records(made):
        spoken = [tuple(words(response.text)) for response in record.rejected]
        assert len({*spoken, tuple(words(record.chosen))}) == len(spoken) + 1
        for response in record.rejected:
            ids = vlm.completion_ids(response.text)
            gold = vlm.completion_ids(record.chosen)
            listed = {s.position: s.new_id for s in response.substitutions}
            assert ids == [listed.get(t, old) for t, old in enumerate(gold)]


def test_levels_descend_by_at_least_the_gap(made: list[PreferenceRecord | Skipped]) -> None:
    several = [record for record in records(made) if len(record.rejected) > 1]
    assert several
    for record in several:
        scores = [response.similarity for response in record.rejected]
        assert all(a - b >= 0.1 - 1e-9 for a, b in pairwise(scores))


@torch.no_grad()
def test_mean_probability_is_that_of_the_text(vlm: VLM, made: list[PreferenceRecord | Skipped]) -> None:
    images = {source.image_digest: image for source, image in sources()}
    for record in records(made)[:3]:
        visual = vlm.visual_tokens(vlm.pixel_values([images[record.image_digest]]))
        for response in record.rejected:
            context = vlm.prefill(vlm.embed([vlm.prompt_ids(record.question)], visual))
            logprobs = vlm.completion_logprobs(context, [[vlm.completion_ids(response.text)]])[0][0]
            assert response.mean_probability == pytest.approx(float(logprobs.mean().exp()), abs=1e-3)


def test_a_record_does_not_depend_on_its_batch(vlm: VLM, made: list[PreferenceRecord | Skipped]) -> None:
    for size in (1, 3):
        again = records(generate(vlm, sources(), CONFIG, batch_size=size))
        for one, other in zip(records(made), again, strict=True):
            assert [r.text for r in one.rejected] == [r.text for r in other.rejected]
            assert one.id == other.id
    assert list(map(content, records(made))) == list(map(content, records(generate(vlm, sources(), CONFIG))))


def test_ids_name_source_configuration_and_adapter(vlm: VLM, tmp_path: Path) -> None:
    with vlm.with_lora(FinetuneConfig(rank=2)) as parameters:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1)
        vlm.adapters.save("trainee", tmp_path)
    vlm.load_adapter(tmp_path, "v@1")
    other = CONFIG.model_copy(update={"seed": 1})
    few = sources(3)
    base = records(generate(vlm, few, CONFIG))
    seeded = records(generate(vlm, few, other))
    adapted = records(generate(vlm, few, CONFIG, adapter="v@1"))
    vlm.unload_adapter("v@1")
    ids = [record.id for record in [*base, *seeded, *adapted]]
    assert len(set(ids)) == len(ids)
    assert all(record.id.startswith("pref_") and len(record.id) == 37 for record in base)
    assert [r.adapter for r in adapted] == ["v@1"] * len(adapted)
    assert [r.rejected for r in adapted] != [r.rejected for r in base]
    assert {(r.config_digest, r.model_digest) for r in seeded} == {(other.digest, vlm.digest)}


def test_the_random_control_is_named_and_differs(vlm: VLM, made: list[PreferenceRecord | Skipped]) -> None:
    substitute = CONFIG.substitute.model_copy(update={"negatives": "random"})
    drawn = records(generate(vlm, sources(), CONFIG.model_copy(update={"substitute": substitute})))
    assert len(drawn) >= 8
    assert {record.method for record in drawn} == {"random"}
    assert not {record.rejected for record in drawn} & {record.rejected for record in records(made)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": " "}, "question is empty"),
        ({"question": "</s>"}, "control tokens"),
        ({"chosen": "..."}, "No word"),
        ({"chosen": "yes <image>"}, "control tokens"),
    ],
)
def test_nothing_is_dropped_in_silence(vlm: VLM, change: dict[str, str], reason: str) -> None:
    bad, good = sources(2)
    outcomes = list(generate(vlm, [(bad[0].but(**change), bad[1]), good], CONFIG))
    assert isinstance(outcomes[0], Skipped)
    assert outcomes[0].source_id == bad[0].id
    assert reason in outcomes[0].reason
    assert isinstance(outcomes[1], PreferenceRecord)


def test_an_improbable_candidate_is_rejected_with_its_reason(vlm: VLM) -> None:
    strict = GenerateConfig.parse({"substitute": {**OPEN, "min_probability": 0.99}})
    outcomes = list(generate(vlm, sources()[1:3], strict))
    assert all(isinstance(outcome, Skipped) and "0.99" in outcome.reason for outcome in outcomes)


def test_progress_and_stopping(vlm: VLM) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(JobCancelled, match="after 4"):
        for _ in generate(
            vlm,
            sources(),
            CONFIG,
            batch_size=4,
            on_progress=lambda done, kept: seen.append((done, kept)),
            should_stop=lambda: bool(seen),
        ):
            pass
    assert [done for done, _ in seen] == [4]
    assert vlm.adapters.active is None


def test_an_unknown_adapter_is_not_found(vlm: VLM) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        list(generate(vlm, sources(1), CONFIG, adapter="nowhere"))


@torch.no_grad()
def test_words_after_an_edit_come_to_agree_with_it(vlm: VLM) -> None:
    visual = vlm.visual_tokens(vlm.pixel_values([picture(0)]))
    context = vlm.prefill(vlm.embed([vlm.prompt_ids("is it?")], visual))
    ids = vlm.completion_ids("left lung nodule")
    swap = Substitution(position=0, old_id=ids[0], new_id=ids[1], sensitivity=1, contrast_probability=0)
    edit = Edit([ids[1], *ids[1:]], (swap,))
    assert agree(vlm, context, [[edit]], plausibility=0.9, rounds=0) == [[]]
    (as_is,) = agree(vlm, context, [[edit]], plausibility=0.0, rounds=0)[0]
    assert as_is.ids == edit.ids
    found = agree(vlm, context, [[edit]], plausibility=0.9, rounds=40)[0]
    for candidate in found:
        logits = vlm.completion_logits(context, [[candidate.ids]])[0][0]
        said = logits.softmax(-1).gather(-1, torch.tensor(candidate.ids)[:, None])[:, 0]
        assert candidate.ids[0] == ids[1]
        assert candidate.ids[-1] == vlm.eos_id
        assert (said[1:] >= 0.89 * logits.softmax(-1).amax(-1)[1:]).all()


def said(count: int = 4) -> list[Said]:
    texts = ["yes, left.", "a stone in the lung", "no", "..."]
    return [Said(f"image{i // 2}", picture(i // 2), "is it?", texts[i]) for i in range(count)]


@torch.no_grad()
def test_dependence_by_its_definition(vlm: VLM) -> None:
    from hscr.contrast.degrade import degrade

    found = visual_dependence(vlm, said(1), adapter=None, masks=3, seed=5)
    (visual,) = vlm.visual_tokens(vlm.pixel_values([picture(0)]))
    prompt, ids = vlm.prompt_ids("is it?"), vlm.completion_ids("yes, left.")
    views = [visual, *(degrade(visual, 0.7, "delete", "image0", mask, 5) for mask in range(3))]
    rows = [
        vlm.completion_logprobs(vlm.prefill(vlm.embed([prompt], [view])), [[ids]])[0][0] for view in views
    ]
    drops = [(rows[0] - row)[vlm.vocabulary.content[ids]] for row in rows[1:]]
    assert found[0] == pytest.approx(float(torch.stack(drops).mean()), abs=1e-4)


def test_dependence_of_nothing_is_zero(vlm: VLM) -> None:
    assert visual_dependence(vlm, said(), adapter=None, rate=0.0, masks=2) == pytest.approx([0, 0, 0, 0])
    assert visual_dependence(vlm, said(), adapter=None, masks=2)[3] == 0


def test_dependence_does_not_depend_on_batch_mates(vlm: VLM) -> None:
    together = visual_dependence(vlm, said(), adapter=None, masks=2)
    alone = [visual_dependence(vlm, [item], adapter=None, masks=2)[0] for item in said()]
    assert together == pytest.approx(alone, abs=1e-4)
    assert any(abs(value) > 1e-3 for value in together)


def test_dependence_of_an_unusable_text_is_refused(vlm: VLM) -> None:
    with pytest.raises(InvalidRecord):
        visual_dependence(vlm, [Said("i", picture(0), "is it?", "")], adapter=None)
