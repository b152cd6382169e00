"""What stands between uploaded bytes and the decoders: size limits, and one way to fail."""

from collections.abc import Callable
from typing import TypeVar

from pydantic import Field

from hscr.errors import HscrError, ImageTooLarge, InvalidImage
from hscr.records import Record

T = TypeVar("T")


class Limits(Record):
    """What one upload may cost. The bound on `pixels` keeps Pillow's own (warning) guard out of play."""

    bytes: int = Field(default=64_000_000, gt=0, description="of the upload, and of a deflated one inflated")
    pixels: int = Field(default=40_000_000, gt=0, le=89_000_000, description="width x height of one frame")


def require_bytes(size: int, limits: Limits) -> None:
    """Raises ImageTooLarge when more bytes than allowed would be held."""
    if size > limits.bytes:
        raise ImageTooLarge(
            f"The image has more than the {limits.bytes / 1e6:g} MB allowed.",
            remedy="Send one frame or one slice, or a compressed file.",
        )


def require_pixels(width: int, height: int, limits: Limits) -> None:
    """Check a header's claim before any pixel is decoded. Raises InvalidImage, ImageTooLarge."""
    if width <= 0 or height <= 0:
        raise InvalidImage("The image has no pixels: its width or height is zero.", remedy="Export it again.")
    if width * height > limits.pixels:
        raise ImageTooLarge(
            f"The image has {width * height / 1e6:.1f} megapixels; {limits.pixels / 1e6:g} are allowed.",
            remedy="Scale it down and send it again.",
        )


def guarded(what: str, action: Callable[[], T]) -> T:
    """Run a third-party decoder over hostile bytes: it may raise anything, the caller sees InvalidImage.

    Decoders quote what they read, so neither their message nor their exception travels on (as cause or
    context): only the exception's class name does.
    """
    try:
        return action()
    except HscrError:
        raise
    except BaseException as error:
        # A panic of a decoder written in Rust (pyo3) is no Exception; an interrupt is none of ours.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = type(error).__name__
    raise InvalidImage(
        f"The {what} is damaged or incomplete ({reason}).",
        remedy="Export it again from its source and send the whole file.",
    )
