"""From sources to records, on a model (algorithms §6: 12; design invariant 9)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from hscr.config import FinetuneConfig, GenerateConfig
from hscr.contrast.agree import Agreed, agree
from hscr.contrast.candidates import Item, candidates
from hscr.contrast.degrade import degrade
from hscr.contrast.dependence import Said, visual_dependence
from hscr.contrast.edit import Branches, Edit, edits
from hscr.contrast.generate import Skipped, generate
from hscr.contrast.rerank import words
from hscr.errors import InvalidConfig, InvalidRecord, JobCancelled, NotFound
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
            assert response.changes == ()


@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
def test_12_substitutions_and_changes_together_make_the_text(vlm: VLM, mode: str) -> None:
    substitute = {**OPEN, "mode": mode, "order": "pdiff_ascending", "plausibility": 0.1, "rounds": 5}
    found = records(generate(vlm, sources(), GenerateConfig.parse({"substitute": substitute})))
    agreed = 0
    for record in found:
        gold = vlm.completion_ids(record.chosen)
        for response in record.rejected:
            tokens: dict[int, int | None] = dict(enumerate(gold))
            for swap in response.substitutions:
                assert tokens[swap.position] == swap.old_id
                tokens[swap.position] = swap.new_id
            for change in response.changes:
                assert tokens.get(change.position) == change.old_id != change.new_id
                tokens[change.position] = change.new_id
            made = [token for _, token in sorted(tokens.items()) if token is not None]
            assert made == vlm.completion_ids(response.text)
            agreed += len(response.changes)
    assert agreed > 0


ABLATIONS: list[dict[str, dict[str, object]]] = [
    {"degrade": {"kind": "pixel"}},
    {"degrade": {"kind": "patch"}},
    {"degrade": {"kind": "latent"}},
    {"degrade": {"mode": "zero"}},
    {"degrade": {"mode": "attn_mask", "positions": "keep_original"}},
    {"sensitive": {"score": "gold_abs"}},
    {"sensitive": {"score": "max_abs"}},
    {"sensitive": {"score": "js"}},
    {"sensitive": {"content_only": False, "literal_n": True}},
    {"substitute": {"source": "full"}},
    {"substitute": {"source": "union"}},
    {"substitute": {"order": "plausible"}},
    {"substitute": {"order": "weighted"}},
    {"substitute": {"order": "sample_pdiff"}},
    {"substitute": {"mode": "autoregressive"}},
    {"substitute": {"mode": "autoregressive", "order": "sample_pdiff"}},
    {"rerank": {"similarity": "token_f1"}},
    {"rerank": {"gap_mode": "from_preferred"}},
]


@pytest.fixture(scope="module")
def ascending(vlm: VLM) -> list[PreferenceRecord]:
    config = GenerateConfig.parse({"substitute": {**OPEN, "order": "pdiff_ascending"}})
    return records(generate(vlm, sources(5), config))


@pytest.mark.parametrize("change", ABLATIONS, ids=str)
def test_12_every_switch_gives_distinct_candidates_that_do_not_depend_on_the_batch(
    vlm: VLM, ascending: list[PreferenceRecord], change: dict[str, dict[str, object]]
) -> None:
    base = {**OPEN, "order": "pdiff_ascending"}
    config = GenerateConfig.parse({**change, "substitute": {**base, **change.get("substitute", {})}})
    together = records(generate(vlm, sources(5), config))
    assert len(together) >= 3
    for record in together:
        spoken = [tuple(words(text)) for text in [record.chosen, *(r.text for r in record.rejected)]]
        assert len(set(spoken)) == len(spoken)
        for response in record.rejected:
            assert vlm.completion_ids(response.text)[-1] == vlm.eos_id
    alone = records(generate(vlm, sources(5), config, batch_size=1))
    assert [[r.text for r in one.rejected] for one in together] == [
        [r.text for r in one.rejected] for one in alone
    ]
    assert [record.rejected for record in together] != [record.rejected for record in ascending]


def test_a_record_names_what_made_it(vlm: VLM) -> None:
    config = GenerateConfig.parse(
        {"substitute": OPEN, "seed": 3, "rerank": {"similarity": "sentence_embedding", "gap": 0.0}}
    )
    found = records(generate(vlm, sources(4), config, embedder=ByLength()))
    assert found
    for record in found:
        assert (record.model_digest, record.config_digest, record.seed) == (vlm.digest, config.digest, 3)
        assert (record.numeric_mode, record.embedder) == ("cpu/float32", "length@1")
        assert PreferenceRecord.model_validate_json(record.model_dump_json()) == record
        for response in record.rejected:
            angle = 0.1 * (len(response.text) - len(record.chosen))
            assert response.similarity == pytest.approx((1 + math.cos(angle)) / 2, abs=1e-4)
    plain = records(generate(vlm, sources(4), CONFIG))
    assert {record.embedder for record in plain} == {None}


class ByLength:
    """An embedder of which anyone can tell what it should say: the angle is the text's length."""

    identity = "length@1"

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        angles = torch.tensor([0.1 * len(text) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_an_embedder_that_cannot_be_loaded_is_refused_before_any_work(vlm: VLM, tmp_path: Path) -> None:
    config = GenerateConfig.parse({"rerank": {"similarity": "sentence_embedding", "embedder": str(tmp_path)}})
    with pytest.raises(InvalidConfig, match=r"rerank\.embedder"):
        next(generate(vlm, sources(1), config))


def test_no_more_than_a_batch_is_taken_from_the_source(vlm: VLM) -> None:
    taken = 0

    def counted() -> Iterator[tuple[PreferenceSource, Image.Image]]:
        nonlocal taken
        for source in sources(20):
            taken += 1
            yield source

    ahead = []
    for outcomes, _ in enumerate(generate(vlm, counted(), CONFIG, batch_size=4), start=1):
        ahead.append(taken - outcomes)
    assert taken == 20
    assert max(ahead) == 3


DECODED = GenerateConfig.parse(
    {"substitute": {"mode": "decoded", "candidates": 8, "max_tokens": 12}, "rerank": {"gap": 0.0}}
)


def test_decoding_goes_on_with_later_batches_while_an_earlier_one_waits_for_its_last_answer(vlm: VLM) -> None:
    taken, ahead = 0, []

    def counted() -> Iterator[tuple[PreferenceSource, Image.Image]]:
        nonlocal taken
        for source in sources(60):
            taken += 1
            yield source

    for outcomes, _ in enumerate(generate(vlm, counted(), DECODED, batch_size=4), start=1):
        ahead.append(taken - outcomes)
    assert taken == len(ahead) == 60
    assert ahead[0] > 4, "the slots hold more than a batch"
    assert max(ahead) < 30, "and no more than they need is taken"


@torch.no_grad()
@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
def test_12_at_most_k_distinct_candidates(vlm: VLM, mode: str) -> None:
    substitute = {**OPEN, "mode": mode, "order": "pdiff_ascending", "candidates": 5}
    config = GenerateConfig.parse({"substitute": substitute, "sensitive": {"literal_n": True}})
    for item, found in zip(items(vlm), *candidates(vlm, [items(vlm)], config), strict=True):
        distinct = {tuple(candidate.ids) for candidate in found}
        assert len(distinct) == len(found) == 5
        assert tuple(item.ids) not in distinct


@torch.no_grad()
def test_both_branches_in_one_pass_are_what_each_is_alone(vlm: VLM) -> None:
    config = GenerateConfig.parse({"substitute": {**OPEN, "order": "pdiff_ascending"}})
    for item, found in zip(items(vlm), *candidates(vlm, [items(vlm)], config), strict=True):
        views = [item.visual, degrade(item.visual, 0.7, "delete", item.id, config.seed)]
        alone = [
            vlm.completion_logits(vlm.prefill(vlm.embed([item.prompt], [view])), [[item.ids]])[0][0]
            for view in views
        ]
        expected = edits(Branches(item.id, item.ids, *alone), vlm.vocabulary, config)
        ids = list(dict.fromkeys(tuple(edit.ids) for edit in expected))
        assert [tuple(candidate.ids) for candidate in found] == ids[: config.substitute.candidates]


def items(vlm: VLM) -> list[Item]:
    visual = vlm.encode({source.id: image for source, image in sources(5)})
    return [
        Item(
            source.id,
            image,
            visual[source.id],
            vlm.prompt_ids(source.question),
            vlm.completion_ids(source.chosen),
        )
        for source, image in sources(5)
    ]


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
        ({"chosen": "yes " * 3000}, "the model reads"),
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


def test_changes_tell_what_became_longer_and_what_shorter() -> None:
    swap = Substitution(position=0, old_id=5, new_id=6, sensitivity=1, contrast_probability=0)
    shorter, longer = (Agreed(ids, Edit([6, 7, 2], (swap,)), 0.5).changes for ids in ([6, 2], [6, 7, 8, 2]))
    assert [(c.position, c.old_id, c.new_id) for c in shorter] == [(1, 7, 2), (2, 2, None)]
    assert [(c.position, c.old_id, c.new_id) for c in longer] == [(2, 2, 8), (3, None, 2)]


def said(count: int = 4) -> list[Said]:
    texts = ["yes, left.", "a stone in the lung", "no", "..."]
    return [Said(f"image{i // 2}", picture(i // 2), "is it?", texts[i]) for i in range(count)]


@torch.no_grad()
def test_dependence_by_its_definition(vlm: VLM) -> None:
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
