"""Whether an engine answers with an adapter, and as its trainer saw it answer."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hscr.engine import ChatRequest, ChatResult, EngineClient
from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.records import AdapterVersion, Sampling
from hscr.store.blobs import Blobs

# Repeated answers in fp32 agree to 1e-6; a log-prob that moved by less than this, in nats, did not move.
_SAME = 1e-4
_PARITY = 1e-3
_SAMPLING = Sampling(temperature=0.0, max_tokens=32)
_TEXT_ONLY: dict[str, Any] = {"question": "What does the image show?", "completion": None}


async def check_shift(engine: EngineClient, base: str, version: AdapterVersion, blobs: Blobs) -> None:
    """Raises AdapterRefused for answers that are the base's, Conflict for others than the trainer saw.

    The probe holds up to four questions about training images, with the adapter's own greedy answers and
    their token log-probs under adapter and base. Where the engine says the same, its mean error must stay
    below half of the trainer's shift (or 1e-3 nats), which tells adapter from base in any numeric mode.
    Where every image was deleted since, a text-only question shows that the adapter does something.
    """
    items = _available(version.probe.get("items", []), blobs)
    differs, agrees = False, []
    for item, image in items:
        adapted = await _ask(engine, version.name, item["question"], image)
        plain = await _ask(engine, base, item["question"], image)
        differs |= _differ(adapted, plain)
        if adapted.text.strip() == item["completion"]:
            agrees.append(_agrees(_logprobs(adapted), item))
    if not differs:
        raise AdapterRefused(
            f"The engine answers with {version.name} exactly as without it.",
            remedy="It was not applied: check that engine and adapter have the same base model.",
        )
    if not any(agrees) and any(image for _, image in items):
        raise Conflict(
            f"The engine answers with {version.name} otherwise than its trainer did.",
            remedy="Check that the engine serves the base model in the trainer's numeric mode.",
        )


def _available(items: Sequence[dict[str, Any]], blobs: Blobs) -> list[tuple[dict[str, Any], bytes | None]]:
    found: list[tuple[dict[str, Any], bytes | None]] = []
    for item in items:
        try:
            found.append((item, blobs.get(item["image_digest"])))
        except NotFound:
            continue  # deleted with its study
    return found or [(_TEXT_ONLY, None)]


async def _ask(engine: EngineClient, model: str, question: str, image: bytes | None) -> ChatResult:
    return await engine.chat(ChatRequest.ask(model, question, image, sampling=_SAMPLING, top_logprobs=0))


def _logprobs(result: ChatResult) -> list[float]:
    return [token.logprob for token in result.logprobs or ()]


def _differ(one: ChatResult, other: ChatResult) -> bool:
    return one.text != other.text or _distance(_logprobs(one), _logprobs(other)) > _SAME


def _agrees(logprobs: Sequence[float], item: dict[str, Any]) -> bool:
    adapted = item["token_logprobs_adapter"]
    shift = _distance(item["token_logprobs_base"], adapted)
    return _distance(logprobs, adapted) <= max(_PARITY, shift / 2)


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of the tokens both have (an engine may leave out end-of-sequence)."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=False))
