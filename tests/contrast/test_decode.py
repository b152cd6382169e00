"""Free decoding from P_diff (algorithms §6: 1, 2, 11) and continuous batching."""

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch

from hscr.contrast.contrast import first_best, log_p_diff
from hscr.contrast.decode import Request, Rule, decode
from hscr.errors import InvalidConfig
from hscr.models.language import View
from hscr.models.vlm import VLM
from tests.tiny_llava import picture

QUESTIONS = ["is it?", "what does this image show, left or right?", "is there a nodule?", "which organ?"]
TOKENS = 7


@pytest.fixture(scope="module")
def requests(vlm: VLM) -> list[Request]:
    tokens = vlm.visual_tokens(vlm.pixel_values([picture(i) for i in range(6)]))
    return [
        Request(
            f"r{i}",
            vlm.prompt_ids(QUESTIONS[i % len(QUESTIONS)]),
            View.whole(visual),
            View.whole(visual[i % 3 :: 3]),
        )
        for i, visual in enumerate(tokens)
    ]


def run(vlm: VLM, requests: list[Request], rule: Rule, **options: int) -> dict[str, list[int]]:
    settings = {"slots": 4, "max_tokens": TOKENS, "stop_id": None, **options}
    with torch.inference_mode():
        return {done.key: done.ids for done in decode(vlm, requests, rule, **settings)}


@torch.no_grad()
def uncached(vlm: VLM, request: Request, rule: Rule, count: int = TOKENS) -> list[int]:
    """P_diff's most probable token each time, both streams forwarded anew, both heads applied."""
    ids: list[int] = []
    while len(ids) < count:
        said = vlm.embed_ids(torch.tensor(ids, dtype=torch.long))
        logits = []
        for view in (request.full, request.dropped):
            row = torch.cat([vlm.embed([request.prompt], [view]).embeds[0], said])
            out = vlm.model(inputs_embeds=row[None], attention_mask=torch.ones(1, len(row)))
            logits.append(out.logits[0, -1:].float())
        scores = log_p_diff(*logits, rule.beta)
        ids.append(int(first_best(scores)))
    return ids


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_11_cached_decoding_equals_uncached(vlm: VLM, requests: list[Request], beta: float) -> None:
    found = run(vlm, requests, Rule(beta=beta))
    assert found == {request.key: uncached(vlm, request, Rule(beta=beta)) for request in requests}


def test_1_without_contrast_the_answer_is_the_models_own(vlm: VLM, requests: list[Request]) -> None:
    found = run(vlm, requests, Rule(beta=0.0), stop_id=vlm.eos_id)
    with torch.inference_mode():
        context = vlm.prefill(vlm.embed([r.prompt for r in requests], [r.full for r in requests]))
        assert [vlm.text(found[r.key]) for r in requests] == vlm.generate_greedy(context, TOKENS)


def test_2_with_equal_streams_the_contrast_weight_is_nothing(vlm: VLM, requests: list[Request]) -> None:
    same = [Request(r.key, r.prompt, r.full, r.full) for r in requests]
    assert run(vlm, same, Rule(beta=0.9)) == run(vlm, same, Rule(beta=0.0))


@pytest.mark.parametrize("rule", [Rule(), Rule(plausibility=0.2), Rule(sample=True), Rule(beta=3.0)])
def test_batch_mates_and_slots_change_nothing(vlm: VLM, requests: list[Request], rule: Rule) -> None:
    alone = {key: ids for request in requests for key, ids in run(vlm, [request], rule).items()}
    for slots in (1, 3, 9):
        assert run(vlm, requests, rule, slots=slots) == alone
    assert run(vlm, requests[::-1], rule) == alone


def test_plausibility_forbids_what_the_full_view_would_not_say(vlm: VLM, requests: list[Request]) -> None:
    strict = run(vlm, requests, Rule(beta=3.0, plausibility=1.0))
    assert strict == run(vlm, requests, Rule(beta=0.0))
    assert strict != run(vlm, requests, Rule(beta=3.0))


def test_sampling_follows_the_seed_and_the_key(vlm: VLM, requests: list[Request]) -> None:
    first = run(vlm, requests, Rule(sample=True, seed=1))
    assert first == run(vlm, requests, Rule(sample=True, seed=1))
    assert first != run(vlm, requests, Rule(sample=True, seed=2))
    twins = [Request(key, requests[0].prompt, requests[0].full, requests[0].dropped) for key in ("a", "b")]
    drawn = run(vlm, twins, Rule(sample=True))
    assert drawn["a"] != drawn["b"]


def test_candidates_share_a_prompt_and_draw_for_themselves(vlm: VLM, requests: list[Request]) -> None:
    asked = [replace(request, count=3) for request in requests]
    with torch.inference_mode():
        for slots in (4, 7, 18):
            ended = list(decode(vlm, asked, Rule(sample=True), stop_id=None, slots=slots, max_tokens=TOKENS))
            found = {(done.key, done.number): done.ids for done in ended}
            assert len(found) == 3 * len(requests)
            firsts = {key: ids for (key, number), ids in found.items() if number == 0}
            assert firsts == run(vlm, requests, Rule(sample=True))
            assert len({tuple(ids) for ids in found.values()}) > 2 * len(requests)
    with pytest.raises(InvalidConfig, match="3 answers were asked of one prompt, but there are 2 slots"):
        run(vlm, asked, Rule(), slots=2)


def test_compiled_steps_say_the_same(
    vlm: VLM, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are ours, the code that is made of them is not, and takes a minute to make.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"stop_id": None, "slots": 2, "max_tokens": TOKENS}
    with torch.inference_mode():
        compiled = {d.key: d.ids for d in decode(vlm, requests[:3], Rule(), compiled=True, **settings)}
    assert compiled == run(vlm, requests[:3], Rule())


def test_a_finished_answer_leaves_its_slot_to_the_next(vlm: VLM, requests: list[Request]) -> None:
    whole = run(vlm, requests, Rule())
    # Whatever one of them says early stands for end-of-sequence: answers then differ in length.
    stop = whole["r0"][1]
    with torch.inference_mode():
        ended = list(decode(vlm, iter(requests), Rule(), stop_id=stop, slots=2, max_tokens=TOKENS))
    lengths = {done.key: len(done.ids) for done in ended}
    assert len(set(lengths.values())) > 1
    for done in ended:
        until = whole[done.key].index(stop) + 1 if stop in whole[done.key] else TOKENS
        assert done.ids == whole[done.key][:until]


def test_requests_are_taken_as_slots_become_free(vlm: VLM, requests: list[Request]) -> None:
    taken: list[str] = []

    def stream() -> object:
        for number in range(1000):
            request = requests[number % len(requests)]
            taken.append(request.key)
            yield Request(f"n{number}", request.prompt, request.full, request.dropped)

    with torch.inference_mode():
        first = list(islice(decode(vlm, stream(), Rule(), stop_id=None, slots=3, max_tokens=2), 4))
    assert len(first) == 4
    assert len(taken) <= 9
