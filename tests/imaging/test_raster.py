"""PNG and JPEG: what comes out, and what is refused how."""

import contextlib
import hashlib
import io
import itertools
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from hscr.errors import ImageTooLarge, InvalidImage, InvalidInput, UnsupportedImage
from hscr.imaging.decode import Prepared, prepare
from hscr.imaging.guard import Limits
from hscr.imaging.png import require_whole
from hscr.imaging.recipes import MAX_SIDE, recipe

LIMITS = Limits()


def decoded(prepared: Prepared) -> Image.Image:
    return Image.open(io.BytesIO(prepared.png))


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def assembled(header: bytes, rows: bytes) -> bytes:
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png(width: int, height: int, rows: bytes) -> bytes:
    return assembled(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), rows)


GRADIENT = Image.fromarray((np.arange(40 * 30).reshape(30, 40) % 256).astype(np.uint8))
BOMB = png(20_000, 15_000, b"\0" * 1000)


def test_grey_stays_one_channel_and_colour_becomes_rgb() -> None:
    grey = decoded(prepare(saved(GRADIENT), limits=LIMITS))
    colour = decoded(prepare(saved(Image.merge("RGB", [GRADIENT] * 3)), limits=LIMITS))
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert np.array_equal(np.asarray(grey), np.asarray(GRADIENT))


def test_same_bytes_in_same_bytes_out_and_the_digest_is_of_the_png() -> None:
    first, second = (prepare(saved(GRADIENT), limits=LIMITS) for _ in range(2))
    assert first == second
    assert first.image.digest == hashlib.sha256(first.png).hexdigest()
    assert first.image.source_digest == hashlib.sha256(saved(GRADIENT)).hexdigest()
    assert (first.image.width, first.image.height, first.image.media_type) == (40, 30, "image/png")


def test_metadata_does_not_pass_through() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("PatientName", "SECRET^NAME")
    loud = saved(GRADIENT, pnginfo=notes, dpi=(300, 300), icc_profile=b"SECRET profile")
    out = prepare(loud, limits=LIMITS)
    assert out.png == prepare(saved(GRADIENT), limits=LIMITS).png
    kinds = {out.png[at + 4 : at + 8] for at in chunk_starts(out.png)}
    assert kinds == {b"IHDR", b"IDAT", b"IEND"}


def chunk_starts(data: bytes) -> list[int]:
    starts = [8]
    while starts[-1] < len(data) - 12:
        starts.append(starts[-1] + 12 + int.from_bytes(data[starts[-1] : starts[-1] + 4]))
    return starts


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    # The stored pixels are what a viewer would turn upright; Pillow's own transpose is the oracle.
    corners = Image.new("RGB", (64, 32), "black")
    corners.paste("white", (0, 0, 16, 8))
    corners.paste("red", (48, 24, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(corners, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    out = prepare(data, limits=LIMITS)
    assert np.array_equal(np.asarray(decoded(out)), np.asarray(upright))
    assert out.image.recipe.parameters["orientation"] == orientation


def test_transparency_is_laid_on_black() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    half = Image.new("LA", (8, 8), (200, 128))
    palette = GRADIENT.convert("P")
    assert np.asarray(decoded(prepare(saved(clear), limits=LIMITS))).max() == 0
    flattened = decoded(prepare(saved(half), limits=LIMITS))
    assert flattened.mode == "L"
    assert abs(int(np.asarray(flattened)[0, 0]) - 200 * 128 / 255) <= 1
    zero_is_clear = decoded(prepare(saved(palette, transparency=255), limits=LIMITS))
    assert np.asarray(zero_is_clear.convert("L"))[6, 15] == 0  # the palette entry 255 is 6*40+15


@pytest.mark.parametrize(("top", "bits"), [(65535, 16), (4095, 12), (200, 8)])
def test_sixteen_bit_grey_is_scaled_by_its_highest_used_bit(top: int, bits: int) -> None:
    values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    out = prepare(saved(Image.fromarray(values)), limits=LIMITS)
    expected = np.rint(values / ((1 << bits) - 1) * 255)
    assert out.image.recipe.parameters["significant_bits"] == bits
    assert np.abs(np.asarray(decoded(out)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_mode_becomes_l_or_rgb(mode: str) -> None:
    data = saved(GRADIENT.convert("RGB").convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert decoded(prepare(data, limits=LIMITS)).mode in {"L", "RGB"}


@pytest.mark.parametrize("size", [(3000, 1500), (1500, 3000), (5000, 1), (1025, 1025)])
def test_output_is_bounded_and_keeps_its_aspect(size: tuple[int, int]) -> None:
    image = prepare(saved(Image.new("L", size, 128)), limits=LIMITS).image
    assert max(image.width, image.height) == MAX_SIDE
    assert abs(image.width / image.height - size[0] / size[1]) <= 0.01 * size[0] / size[1] or min(size) == 1


def test_small_images_are_not_enlarged() -> None:
    assert prepare(saved(GRADIENT), limits=LIMITS).image.width == 40


def test_the_first_frame_of_an_animation_is_used_and_named() -> None:
    frames = [Image.new("L", (16, 16), level) for level in (10, 200)]
    out = prepare(saved(frames[0], save_all=True, append_images=frames[1:]), limits=LIMITS)
    parameters = out.image.recipe.parameters
    assert (parameters["frame"], parameters["frames"]) == (0, 2)
    assert np.asarray(decoded(out)).max() == 10


def test_recipe_digest_covers_name_and_parameters() -> None:
    digests = {
        recipe(name, {"window": window}).digest
        for name, window in itertools.product(("raster@1", "raster@2"), (1, 2))
    }
    assert len(digests) == 4
    assert recipe("raster@1", {"a": 1, "b": 2}) == recipe("raster@1", {"b": 2, "a": 1})


def test_content_decides_not_a_claim() -> None:
    assert prepare(saved(GRADIENT, "JPEG"), limits=LIMITS).image.media_type == "image/jpeg"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedImage, match="PNG, JPEG or DICOM"):
        prepare(saved(GRADIENT, kind), limits=LIMITS)


def test_nothing_at_all_says_so() -> None:
    with pytest.raises(UnsupportedImage, match="0 bytes"):
        prepare(b"", limits=LIMITS)


def corrupted(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 20
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


BROKEN = {
    "png cut in the middle": saved(GRADIENT)[:-40],
    "png cut after the last row": saved(GRADIENT)[:-12],
    "png with a wrong checksum": corrupted(saved(GRADIENT)),
    "png with a wrong IEND checksum": saved(GRADIENT)[:-1] + b"\0",
    "png with too few rows": png(64, 64, b"\0" * 65 * 10),
    "png of no width": png(0, 10, b""),
    "png that is only a signature": b"\x89PNG\r\n\x1a\n",
    "jpeg cut in the middle": saved(Image.effect_noise((200, 200), 90), "JPEG")[:5000],
    "jpeg that is only a marker": b"\xff\xd8\xff\xe0",
    "jpeg of no height": saved(GRADIENT, "JPEG").replace(b"\x00\x1e\x00\x28", b"\x00\x00\x00\x28", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(InvalidImage) as refusal:
        prepare(BROKEN[name], limits=LIMITS)
    assert refusal.value.remedy
    assert refusal.value.__cause__ is None
    assert refusal.value.__context__ is None


def test_a_window_or_a_frame_of_a_png_is_refused() -> None:
    for options in ({"window": "lung"}, {"frame": 1}):
        with pytest.raises(InvalidInput, match="DICOM"):
            prepare(saved(GRADIENT), limits=LIMITS, **options)


def test_limits() -> None:
    with pytest.raises(ImageTooLarge, match="megapixels"):
        prepare(saved(GRADIENT), limits=Limits(pixels=1199))
    assert prepare(saved(GRADIENT), limits=Limits(pixels=1200)).image.width == 40
    with pytest.raises(ImageTooLarge, match="MB"):
        prepare(saved(GRADIENT), limits=Limits(bytes=10))


def test_a_bomb_is_refused_by_its_header_in_no_time() -> None:
    started = time.perf_counter()
    with pytest.raises(ImageTooLarge, match=r"300\.0 megapixels"):
        prepare(BOMB, limits=LIMITS)
    assert time.perf_counter() - started < 0.1


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    # A process of its own, for peak memory never falls again. 300 MB would show at once.
    (tmp_path / "bomb.png").write_bytes(BOMB)
    program = f"""
import resource
from hscr.errors import ImageTooLarge
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
data = open({str(tmp_path / "bomb.png")!r}, "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    prepare(data, limits=Limits())
except ImageTooLarge:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 5_000  # kilobytes


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_only_ever_invalid(data: bytes) -> None:
    for head in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        saved(GRADIENT)[:60],
        saved(GRADIENT, "JPEG")[:300],
    ):
        try_to_prepare(head + data)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 900), st.integers(0, 255), st.sampled_from(["PNG", "JPEG"]))
def test_a_changed_byte_or_a_cut_is_decoded_or_invalid(at: int, value: int, kind: str) -> None:
    data = saved(GRADIENT, kind)
    try_to_prepare(data[:at] + bytes([value]) + data[at + 1 :])
    try_to_prepare(data[:at])


def try_to_prepare(data: bytes) -> None:
    """Any exception but InvalidImage is the failure this looks for."""
    with contextlib.suppress(InvalidImage):
        prepare(data, limits=Limits(pixels=4_000_000))


# Adam7 as the standard draws it (PNG §8.2): the pass of each pixel of an 8 x 8 tile.
ADAM7 = ("16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
    st.booleans(),
)
def test_a_png_is_whole_with_every_row_and_not_with_less(
    width: int, height: int, mode: str, interlaced: bool
) -> None:
    header, rows = raw_png(width, height, mode, interlaced)
    require_whole(assembled(header, rows))
    with pytest.raises(InvalidImage, match="rows are missing"):
        require_whole(assembled(header, rows[:-1]))


def raw_png(width: int, height: int, mode: str, interlaced: bool) -> tuple[bytes, bytes]:
    """IHDR and blank filtered rows, counted pixel by pixel."""
    bits, colour = {"1": (1, 0), "L": (8, 0), "LA": (8, 4), "P": (8, 3), "RGB": (8, 2), "RGBA": (8, 6)}[mode]
    depth = bits * len(Image.new(mode, (1, 1)).getbands())
    pixels = ((ADAM7[y % 8][x % 8] if interlaced else "1", y) for y in range(height) for x in range(width))
    size = sum(1 + (count * depth + 7) // 8 for count in Counter(pixels).values())
    return struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)), bytes(size)


@pytest.mark.data
def test_real_radiographs(vqa_rad: Path) -> None:
    for path in sorted((vqa_rad / "images").glob("*.jpg"))[:12]:
        prepared = prepare(path.read_bytes(), limits=LIMITS)
        assert prepared.image.recipe.name == "raster@1"
        assert max(prepared.image.width, prepared.image.height) <= MAX_SIDE
        assert np.asarray(decoded(prepared)).std() > 10
