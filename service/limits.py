"""What is refused before it costs anything: too many questions at once, unusable texts, foreign addresses."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hscr.errors import InvalidImage, InvalidQuestion, Overloaded

# Tokens that the chat templates of the supported models give a meaning: a user must not speak as the system.
_CONTROL_TOKENS = re.compile(
    r"</?s>|<image>|<im_(?:start|end|patch)>|<(?:unk|pad|bos|eos)>|</?\|[^|<>]{1,40}\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>",
    re.IGNORECASE,
)
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Admission:
    """Bounds the questions being answered; counting here spares the engine's queue and this memory."""

    def __init__(self, limit: int, retry_after: Callable[[], int]) -> None:
        self._limit = limit
        self._retry_after = retry_after
        self._taken = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Raises Overloaded."""
        if self._taken >= self._limit:
            raise Overloaded(
                f"{self._limit} questions are being answered already.",
                remedy="Try again after the seconds in Retry-After.",
                retry_after=self._retry_after(),
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


def usable_text(text: str, *, longest: int) -> str:
    """The text stripped. Raises InvalidQuestion when it is empty, too long or carries control tokens."""
    text = text.strip()
    if not text:
        raise InvalidQuestion("The question is empty.", remedy="Write what you want to know about the image.")
    if len(text) > longest:
        raise InvalidQuestion(
            f"The question has {len(text)} characters; at most {longest} are allowed.", remedy="Shorten it."
        )
    if _CONTROL_TOKENS.search(text) or _CONTROL_CHARACTERS.search(text):
        raise InvalidQuestion(
            "The question carries control characters or tokens that steer the model, such as <image>.",
            remedy="Remove them; the image travels in its own field.",
        )
    return text


def image_bytes(text: str) -> bytes:
    """Base64, bare or as a data URL of any media type. Raises InvalidImage; nothing is ever fetched."""
    header = _DATA_URL.match(text)
    if header is None and _URL.match(text):
        raise InvalidImage(
            "Only base64 and base64 data URLs are read: nothing is fetched from an address.",
            remedy="Send `data:<media type>;base64,...` with the image's own bytes.",
        )
    try:
        data = base64.b64decode(text[header.end() :] if header else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage("The image is not valid base64.", remedy="Encode its bytes again.") from error
    if not data:
        raise InvalidImage("The image is empty.", remedy="Send the bytes of a PNG, JPEG or DICOM file.")
    return data
