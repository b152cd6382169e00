"""The one way in: uploaded bytes to a prepared image."""

import hashlib
from dataclasses import dataclass, field

from hscr.errors import InvalidInput
from hscr.imaging import dicom, raster
from hscr.imaging.guard import Limits, guarded, require_bytes
from hscr.imaging.headers import DICOM, media_type
from hscr.imaging.recipes import Pixels, bounded, encoded, recipe
from hscr.records import Image


@dataclass(frozen=True)
class Prepared:
    """What the model will see, and what may be stored about it.

    `png` is an upright 8-bit PNG without metadata, mode L where the source was grey and RGB otherwise, its
    longest side at most `recipes.MAX_SIDE`; the same upload always gives the same bytes. `study` is the keyed
    hash of the DICOM study, `tags` the allow-listed attributes (`deidentify`).
    """

    png: bytes
    image: Image
    study: str | None = None
    tags: dict[str, str | int] = field(default_factory=dict)


def prepare(
    data: bytes,
    *,
    limits: Limits,
    frame: int | None = None,
    window: str | None = None,
    secret: bytes | None = None,
) -> Prepared:
    """Decode, tone, turn upright, bound and re-encode one image.

    Args:
        data: PNG, JPEG or DICOM, told apart by content alone.
        limits: bytes and pixels; both are checked before any pixel is decoded.
        frame: 0-based frame of a multi-frame DICOM file; None takes the middle one.
        window: name of a CT window (`voi.CT_PRESETS`); None follows the file.
        secret: at least 16 bytes; with it `study` is filled from a DICOM file.

    Raises:
        UnsupportedImage: another format, or a transfer syntax that is not decoded.
        ImageTooLarge: more bytes or pixels than allowed.
        InvalidImage: damaged, truncated or without pixels.
        InvalidInput: a frame or window that this image does not have.
    """
    require_bytes(len(data), limits)
    kind = media_type(data)
    what = kind.partition("/")[2].upper()
    pixels = guarded(
        f"{what} file", lambda: _read(data, kind, limits, frame=frame, window=window, secret=secret)
    )
    image = bounded(pixels.image)
    png = encoded(image)
    return Prepared(
        png=png,
        image=Image(
            digest=hashlib.sha256(png).hexdigest(),
            source_digest=hashlib.sha256(data).hexdigest(),
            width=image.width,
            height=image.height,
            media_type=kind,
            modality=pixels.modality,
            recipe=recipe(pixels.recipe, pixels.parameters),
        ),
        study=pixels.study,
        tags=pixels.tags,
    )


def _read(
    data: bytes, kind: str, limits: Limits, *, frame: int | None, window: str | None, secret: bytes | None
) -> Pixels:
    if kind == DICOM:
        return dicom.read(data, limits, frame=frame, window=window, secret=secret)
    if window is not None or frame not in (None, 0):
        raise InvalidInput("Frames and windows belong to DICOM files.", remedy="Leave them out.")
    return raster.read(data, kind, limits)
