"""Whether an engine answers with an adapter, and as its trainer saw it answer.

Two engines never agree to the last bit, so what is compared is the *shift* adapter - base of each token: its
correlation with the trainer's must be at least 0.9, and its mean error at most 1e-3 nats or three times the
error that the base model itself shows in this engine, whichever is larger.
"""

import asyncio
from collections.abc import Sequence
from statistics import correlation, fmean
from typing import Any, NamedTuple

from hscr.engine import ChatRequest, EngineClient, Message
from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.records import AdapterVersion
from hscr.store.blobs import Blobs

# Log-probs in fp32 agree to 1e-6 when asked for again; what moved by less than this, in nats, did not move.
_SAME = 1e-4
_CORRELATION = 0.9
_ERROR = 1e-3
_ANYTHING: dict[str, Any] = {"question": "What does the image show?", "completion": "The image shows"}


class Token(NamedTuple):
    """Log-probs, in nats, of one token of an adapter's answer."""

    trainer_base: float
    trainer_adapter: float
    engine_base: float
    engine_adapter: float

    @property
    def trainer_shift(self) -> float:
        return self.trainer_adapter - self.trainer_base

    @property
    def engine_shift(self) -> float:
        return self.engine_adapter - self.engine_base

    @property
    def base_error(self) -> float:
        return abs(self.engine_base - self.trainer_base)


async def check_shift(engine: EngineClient, base: str, version: AdapterVersion, blobs: Blobs) -> None:
    """Raises AdapterRefused for log-probs that are the base's, Conflict for others than the trainer's.

    The probe holds up to four questions about training images, with the adapter's own answers and their token
    log-probs under adapter and base. The engine reads each as given, which takes it one step and not one a
    token. Without any image, since all were deleted, a text shows that the adapter does something.
    """
    differs, tokens = False, list[Token]()
    for item, image in await asyncio.to_thread(_available, version.probe.get("items", []), blobs):
        # One answer after another: whoever waits for one of their own goes first.
        adapted, plain = await asyncio.gather(
            *(engine.read(_given(name, item, image)) for name in (version.name, base))
        )
        differs |= fmean(abs(a - b) for (_, a), (_, b) in zip(adapted, plain, strict=True)) > _SAME
        if image is not None:
            tokens += _tokens(item, adapted, plain)
    if not differs:
        raise AdapterRefused(
            f"The engine answers with {version.name} exactly as without it.",
            remedy="It was not applied: check that engine and adapter have the same base model.",
        )
    disparity = find_disparity(tokens) if tokens else None
    if disparity is not None:
        raise Conflict(
            f"The engine answers with {version.name} otherwise than its trainer did: {disparity}.",
            remedy="Check that the engine serves the base model in the trainer's numeric mode.",
        )


def find_disparity(tokens: Sequence[Token]) -> str | None:
    """What breaks the rule of adapter parity, or None; at least one token is needed."""
    trainer = [token.trainer_shift for token in tokens]
    engine = [token.engine_shift for token in tokens]
    error = fmean(abs(a - b) for a, b in zip(trainer, engine, strict=True))
    allowed = max(_ERROR, 3 * fmean(token.base_error for token in tokens))
    if not error <= allowed:
        return f"its shift is off by {error:.2g} nats a token, where {allowed:.2g} are allowed"
    # Of shifts that are all alike there is no correlation, and their error has said all.
    if len(set(trainer)) > 1 and (len(set(engine)) < 2 or correlation(trainer, engine) < _CORRELATION):
        return f"its shift correlates less than {_CORRELATION} with the trainer's"
    return None


def _available(items: Sequence[dict[str, Any]], blobs: Blobs) -> list[tuple[dict[str, Any], bytes | None]]:
    found: list[tuple[dict[str, Any], bytes | None]] = []
    for item in items:
        if "completion_ids" not in item:
            continue  # of a version that was trained before they were kept
        try:
            found.append((item, blobs.get(item["image_digest"])))
        except NotFound:
            continue  # deleted with its study
    return found or [(_ANYTHING, None)]


def _given(model: str, item: dict[str, Any], image: bytes | None) -> ChatRequest:
    messages = (Message(text=item["question"]), Message(role="assistant", text=item["completion"]))
    return ChatRequest(model=model, messages=messages, image=image)


def _tokens(
    item: dict[str, Any], adapted: Sequence[tuple[int, float]], plain: Sequence[tuple[int, float]]
) -> list[Token]:
    """Those of the answer. Raises Conflict when the engine has read it as other ones."""
    ids = item["completion_ids"]
    if [token for token, _ in adapted[-len(ids) :]] != ids:
        raise Conflict(
            "The engine reads the adapter's answers as other tokens than its trainer did.",
            remedy="Start engine and workers with one model folder: its tokenizer and chat template.",
        )
    return [
        Token(trainer_base, trainer_adapter, engine_base, engine_adapter)
        for trainer_base, trainer_adapter, (_, engine_base), (_, engine_adapter) in zip(
            item["token_logprobs_base"],
            item["token_logprobs_adapter"],
            plain[-len(ids) :],
            adapted[-len(ids) :],
            strict=True,
        )
    ]
