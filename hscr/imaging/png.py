"""Is a PNG whole? Decoders fill rows that are missing with black, which in a radiograph is a finding.

Source: PNG, third edition, §5 (chunks), §8 (interlacing), §9 (filter bytes).
"""

import zlib
from collections.abc import Iterator

from hscr.errors import InvalidImage

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(x start, y start, x step, y step) of each interlacing pass."""


def require_whole(data: bytes) -> None:
    """Check every chunk's checksum and that the image data holds every row. Inflates no more than that.

    Raises InvalidImage. The size in IHDR must have been checked before: it bounds the work done here.
    """
    chunks = list(_chunks(data))
    if not chunks or chunks[-1][0] != b"IEND":
        raise _incomplete("it ends before its last chunk")
    needed = _raw_size(chunks[0][1])
    inflate = zlib.decompressobj()
    found = 0
    for body in (body for kind, body in chunks if kind == b"IDAT"):
        while body and found < needed:
            found += len(inflate.decompress(body, min(1 << 20, needed - found)))
            body = inflate.unconsumed_tail  # noqa: PLW2901
    if found < needed:
        raise _incomplete("rows are missing")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind, body, checksum = data[at + 4 : at + 8], data[at + 8 : end], data[end : end + 4]
        if zlib.crc32(kind + body) != int.from_bytes(checksum):
            raise _incomplete("a checksum is wrong")
        yield kind, body
        at = end + 4


def _raw_size(header: bytes) -> int:
    """Bytes of all filtered rows, from IHDR's 13."""
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    bits = header[8] * _CHANNELS.get(header[9], 0)
    if bits == 0:
        raise _incomplete("its header names no colour type")
    passes = _ADAM7 if header[12] else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)


def _incomplete(why: str) -> InvalidImage:
    return InvalidImage(
        f"The PNG is damaged or incomplete: {why}.",
        remedy="Export it again from its source and send the whole file.",
    )
