"""Values the store's tests are made of."""

from hscr.records import Answer, AnswerKind, Image, PreferenceSource, Provenance, Recipe, Sampling

RECIPE = Recipe(name="raster@1", digest="r")


def source(name: str, **values: object) -> PreferenceSource:
    given = {
        "id": name,
        "image_digest": "i",
        "study": "st",
        "question": "q?",
        "chosen": "yes.",
        "consent": True,
    }
    return PreferenceSource.model_validate({**given, **values})


def answer(name: str, **values: object) -> Answer:
    image = Image(digest="i", source_digest="s", width=1, height=1, media_type="image/png", recipe=RECIPE)
    made_by = Provenance(
        model="m", model_digest="d", adapter=None, adapter_digest=None, recipe=RECIPE, template_digest="t",
        sampling=Sampling(), numeric_mode="cpu/float32", engine="e/1",
    )  # fmt: skip
    given = {
        "id": name, "kind": AnswerKind.VQA, "study": "st", "image": image, "question": "q?", "text": "no.",
        "finish_reason": "stop", "provenance": made_by,
    }  # fmt: skip
    return Answer.model_validate({**given, **values})
