"""Whether an engine answers with an adapter, and as its trainer saw it answer.

Two engines never agree to the last bit, so what is compared is the *shift* adapter - base of each token: its
correlation with the trainer's must be at least 0.9, and its mean error at most 1e-3 nats or three times the
error that the base model itself shows in this engine, whichever is larger.
"""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from statistics import correlation, fmean
from typing import Any, NamedTuple

from hscr.engine import ChatRequest, ChatResult, EngineClient
from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.records import AdapterVersion, Sampling
from hscr.store.blobs import Blobs

# Repeated answers in fp32 agree to 1e-6; a log-prob that moved by less than this, in nats, did not move.
_SAME = 1e-4
_CORRELATION = 0.9
_ERROR = 1e-3
_ALTERNATIVES = 20
_SAMPLING = Sampling(temperature=0.0, max_tokens=32)
_TEXT_ONLY: dict[str, Any] = {"question": "What does the image show?", "completion": None}


class Token(NamedTuple):
    """Log-probs, in nats, of one token of an adapter's answer; `engine_base` where the engine told it."""

    trainer_base: float
    trainer_adapter: float
    engine_base: float | None
    engine_adapter: float

    @property
    def trainer_shift(self) -> float:
        return self.trainer_adapter - self.trainer_base

    @property
    def engine_shift(self) -> float:
        return self.engine_adapter - (self.trainer_base if self.engine_base is None else self.engine_base)


async def check_shift(engine: EngineClient, base: str, version: AdapterVersion, blobs: Blobs) -> None:
    """Raises AdapterRefused for answers that are the base's, Conflict for others than the trainer saw.

    The probe holds up to four questions about training images, with the adapter's own greedy answers and
    their token log-probs under adapter and base; answers in which the engine says the same are compared.
    Where every image was deleted since, a text-only question shows that the adapter does something.
    """
    differs, tokens = False, list[Token]()
    items = _available(version.probe.get("items", []), blobs)
    # All at once: between two steps of a busy engine they wait together instead of one after another.
    asked = [
        _ask(engine, name, item["question"], image) for item, image in items for name in (version.name, base)
    ]
    said = await asyncio.gather(*asked)
    for (item, _), adapted, plain in zip(items, said[::2], said[1::2], strict=True):
        differs |= _differ(adapted, plain)
        if adapted.text.strip() == item["completion"]:
            tokens += _tokens(item, adapted, plain)
    if not differs:
        raise AdapterRefused(
            f"The engine answers with {version.name} exactly as without it.",
            remedy="It was not applied: check that engine and adapter have the same base model.",
        )
    disparity = find_disparity(tokens) if any(image for _, image in items) else None
    if disparity is not None:
        raise Conflict(
            f"The engine answers with {version.name} otherwise than its trainer did: {disparity}.",
            remedy="Check that the engine serves the base model in the trainer's numeric mode.",
        )


def find_disparity(tokens: Sequence[Token]) -> str | None:
    """What breaks the rule of adapter parity, or None.

    The base model's own error is that of the tokens whose log-prob under it the engine told.
    """
    if not tokens:
        return "it says none of the same answers"
    trainer = [token.trainer_shift for token in tokens]
    engine = [token.engine_shift for token in tokens]
    own = [abs(t.engine_base - t.trainer_base) for t in tokens if t.engine_base is not None]
    error = fmean(abs(a - b) for a, b in zip(trainer, engine, strict=True))
    allowed = max(_ERROR, 3 * fmean(own or [0.0]))
    if not error <= allowed:
        return f"its shift is off by {error:.2g} nats a token, where {allowed:.2g} are allowed"
    # Of shifts that are all alike there is no correlation, and their error has said all.
    if len(set(trainer)) > 1 and (len(set(engine)) < 2 or correlation(trainer, engine) < _CORRELATION):
        return f"its shift correlates less than {_CORRELATION} with the trainer's"
    return None


def _available(items: Sequence[dict[str, Any]], blobs: Blobs) -> list[tuple[dict[str, Any], bytes | None]]:
    found: list[tuple[dict[str, Any], bytes | None]] = []
    for item in items:
        try:
            found.append((item, blobs.get(item["image_digest"])))
        except NotFound:
            continue  # deleted with its study
    return found or [(_TEXT_ONLY, None)]


async def _ask(engine: EngineClient, model: str, question: str, image: bytes | None) -> ChatResult:
    request = ChatRequest.ask(model, question, image, sampling=_SAMPLING, top_logprobs=_ALTERNATIVES)
    return await engine.chat(request)


def _differ(one: ChatResult, other: ChatResult) -> bool:
    pairs = zip(_logprobs(one), _logprobs(other), strict=False)
    return one.text != other.text or fmean([abs(a - b) for a, b in pairs] or [0.0]) > _SAME


def _tokens(item: dict[str, Any], adapted: ChatResult, plain: ChatResult) -> Iterator[Token]:
    """Those both have: an engine may leave out end-of-sequence."""
    stored = zip(item["token_logprobs_base"], item["token_logprobs_adapter"], strict=True)
    said = zip_longest(_logprobs(adapted), _base_logprobs(adapted, plain))
    for (trainer_base, trainer_adapter), (engine_adapter, engine_base) in zip(stored, said, strict=False):
        yield Token(trainer_base, trainer_adapter, engine_base, engine_adapter)


def _base_logprobs(adapted: ChatResult, plain: ChatResult) -> list[float]:
    """What the base gives the adapter's tokens, as far as its own answer tells.

    It does while both say the same, and once more where they part, if the adapter's token is among the
    base's most probable.
    """
    found = []
    for wanted, own in zip(adapted.logprobs or (), plain.logprobs or (), strict=False):
        told = own.logprob if own.token == wanted.token else dict(own.top).get(wanted.token)
        if told is not None:
            found.append(told)
        if own.token != wanted.token:
            break
    return found


def _logprobs(result: ChatResult) -> list[float]:
    return [token.logprob for token in result.logprobs or ()]
