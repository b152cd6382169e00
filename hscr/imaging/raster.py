"""PNG and JPEG to upright 8-bit pixels."""

import io
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from hscr.errors import InvalidImage
from hscr.imaging.guard import Limits, require_pixels
from hscr.imaging.headers import PNG, codestream_shape, png_size
from hscr.imaging.png import require_whole
from hscr.imaging.recipes import OUTPUT, Pixels

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "F"}


def read(data: bytes, kind: str, limits: Limits) -> Pixels:
    """Decode a PNG or JPEG: first frame, EXIF orientation applied, transparency laid on black, 8 bits.

    Raises InvalidImage, ImageTooLarge; a decoder's own exceptions pass through for `guarded`.
    """
    require_pixels(*_claimed_size(data, kind), limits)
    image = _open(data, kind)
    parameters: dict[str, Any] = {**OUTPUT, "frame": 0, "frames": getattr(image, "n_frames", 1)}
    # APNG and MPO carry several pictures: the first is used and the recipe says so.
    image.load()
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    image, bits = _eight_bits(image)
    image = _opaque(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    parameters |= {"orientation": orientation, "background": "black", "significant_bits": bits}
    return Pixels(image, "raster@1", parameters)


def _claimed_size(data: bytes, kind: str) -> tuple[int, int]:
    if kind == PNG:
        return png_size(data)
    shape = codestream_shape(data)
    if shape is None:
        raise InvalidImage("The JPEG has no frame header.", remedy="Export it again and send the whole file.")
    return shape[:2]


def _open(data: bytes, kind: str) -> Image.Image:
    # The plugins themselves, for Image.open would try other formats and apply its own size guard.
    if kind != PNG:
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    require_whole(data)
    return PngImagePlugin.PngImageFile(io.BytesIO(data))


def _eight_bits(image: Image.Image) -> tuple[Image.Image, int]:
    """8-bit pixels and how many of the file's bits carry a value.

    A 12-bit detector's picture in a 16-bit PNG would be black if it were divided by 65535, so 16-bit grey is
    scaled by its highest used bit (at least 8). Pillow itself reduces 16-bit colour to its upper 8 bits.
    """
    if not image.mode.startswith("I"):
        return image, 8
    values = np.asarray(image).astype(np.int64)
    bits = max(8, int(values.max()).bit_length())
    top = (1 << bits) - 1
    return Image.fromarray(((values * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)), bits


def _opaque(image: Image.Image) -> Image.Image:
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert(mode)
