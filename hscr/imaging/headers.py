"""What a file's first bytes say about it: its format, and its size without decoding a pixel."""

from hscr.errors import InvalidImage, UnsupportedImage

PNG = "image/png"
JPEG = "image/jpeg"
DICOM = "application/dicom"

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
_JPEG_NO_FRAME = {0xC4, 0xC8, 0xCC}
_JPEG_LS_FRAME = 0xF7
_JPEG_SCAN = 0xDA
_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD9)}


def media_type(data: bytes) -> str:
    """PNG, JPEG or DICOM, told by content; a name or a claimed type is never looked at.

    DICOM without its preamble (PS3.10 §7.1) is known by a first element of group 0002 or 0008.
    Raises UnsupportedImage for anything else.
    """
    if data.startswith(_PNG_SIGNATURE):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data[128:132] == b"DICM" or data[:2] in _FIRST_GROUPS:
        return DICOM
    raise UnsupportedImage(
        "The bytes are neither a PNG, a JPEG nor a DICOM file." if data else "The image is empty (0 bytes).",
        remedy="Send one image as PNG, JPEG or DICOM (part 10).",
    )


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) of IHDR, which must come first (PNG §5.6)."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise InvalidImage("The PNG has no header.", remedy="Export it again and send the whole file.")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def codestream_shape(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) of a JPEG, JPEG-LS or JPEG 2000 stream; None without a frame header.

    Sources: ITU-T T.81 B.2.2 (SOFn), T.87 C.2.2 (SOF55), T.800 A.5.1 (SIZ, behind SOC, perhaps inside a JP2).
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg_shape(data)
    start = data.find(b"\xff\x4f\xff\x51")
    return None if start < 0 else _jpeg2000_shape(data[start + 4 : start + 42])


def _jpeg_shape(data: bytes) -> tuple[int, int, int] | None:
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _JPEG_STANDALONE:
            position += 1 if marker == 0xFF else 2
        elif marker == _JPEG_LS_FRAME or (0xC0 <= marker <= 0xCF and marker not in _JPEG_NO_FRAME):
            height = int.from_bytes(data[position + 5 : position + 7])
            return int.from_bytes(data[position + 7 : position + 9]), height, data[position + 9]
        elif marker == _JPEG_SCAN:
            return None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _jpeg2000_shape(siz: bytes) -> tuple[int, int, int] | None:
    if len(siz) < 38:
        return None
    width, height, left, top = (int.from_bytes(siz[at : at + 4]) for at in (4, 8, 12, 16))
    return width - left, height - top, int.from_bytes(siz[36:38])
