"""DICOM: real files of many kinds and transfer syntaxes, the greyscale pipeline, what must not leave."""

import contextlib
import io
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing, get_decoder
from pydicom.uid import (
    MPEG4HP41,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from hscr.errors import HscrError, ImageTooLarge, InvalidConfig, InvalidImage, InvalidInput, UnsupportedImage
from hscr.imaging.decode import Prepared, prepare
from hscr.imaging.deidentify import study_key
from hscr.imaging.dicom import DECODERS
from hscr.imaging.guard import Limits
from hscr.imaging.voi import CT_PRESETS, Window

LIMITS = Limits()
SECRET = b"0123456789abcdef"
Read = Callable[[str], bytes]

# pydicom's warnings quote element values; they are ignored at import, which pytest undoes for each test.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def pixels(prepared: Prepared) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(prepared.png)))


def image_object(values: np.ndarray, **attributes: object) -> Dataset:
    """A minimal secondary capture around the given stored values (uint8, uint16 or int16)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * values.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def written(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


REAL = [
    # name, recipe, modality, (width, height)
    ("RG1_UNCR.dcm", "dicom-voi@1", "CR", (964, 1024)),
    ("RG1_J2KR.dcm", "dicom-voi@1", "CR", (964, 1024)),
    ("CT_small.dcm", "dicom-ct-soft-tissue@1", "CT", (128, 128)),
    ("693_J2KI.dcm", "dicom-voi@1", "CT", (512, 512)),
    ("eCT_Supplemental.dcm", "dicom-voi@1", "CT", (512, 512)),
    ("emri_small_jpeg_ls_lossless.dcm", "dicom-percentile@1", "MR", (64, 64)),
    ("MR_small_RLE.dcm", "dicom-voi@1", "MR", (64, 64)),
    ("MR_small_bigendian.dcm", "dicom-voi@1", "MR", (64, 64)),
    ("JPEG-LL.dcm", "dicom-percentile@1", "NM", (256, 1024)),
    ("JPGLosslessP14SV1_1s_1f_8b.dcm", "dicom-voi@1", "US", (1024, 768)),
    ("image_dfl.dcm", "dicom-stored-range@1", "OT", (512, 512)),
    ("vlut_04.dcm", "dicom-voi@1", "OT", (512, 512)),
    ("mlut_18.dcm", "dicom-percentile@1", "OT", (512, 512)),
    ("examples_palette.dcm", "dicom-palette@1", "US", (800, 350)),
    ("examples_ybr_color.dcm", "dicom-colour@1", "US", (320, 240)),
    ("US1_J2KI.dcm", "dicom-colour@1", "US", (640, 480)),
    ("SC_rgb_16bit.dcm", "dicom-colour@1", "OT", (100, 100)),
]


@pytest.mark.parametrize(("name", "recipe", "modality", "size"), REAL)
def test_real_files(dicom: Read, name: str, recipe: str, modality: str, size: tuple[int, int]) -> None:
    prepared = prepare(dicom(name), limits=LIMITS)
    image = prepared.image
    assert (image.recipe.name, image.modality, (image.width, image.height)) == (recipe, modality, size)
    assert image.media_type == "application/dicom"
    assert pixels(prepared).ndim == (3 if recipe in {"dicom-colour@1", "dicom-palette@1"} else 2)
    assert pixels(prepared).std() > 5


@pytest.mark.parametrize(
    ("plain", "compressed"),
    [
        ("MR_small.dcm", "MR_small_RLE.dcm"),
        ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
        ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"),
        ("MR_small.dcm", "MR_small_bigendian.dcm"),
        ("RG3_UNCR.dcm", "RG3_J2KR.dcm"),
        ("emri_small.dcm", "emri_small_RLE.dcm"),
        ("US1_UNCR.dcm", "US1_J2KR.dcm"),
    ],
)
def test_lossless_transfer_syntaxes_give_the_same_picture(dicom: Read, plain: str, compressed: str) -> None:
    assert prepare(dicom(plain), limits=LIMITS).png == prepare(dicom(compressed), limits=LIMITS).png


def test_the_radiograph_is_shown_bones_white(dicom: Read) -> None:
    # RG1 is MONOCHROME1: without the inversion the lungs would be brighter than the abdomen.
    grey = pixels(prepare(dicom("RG1_UNCR.dcm"), limits=LIMITS)).astype(float)
    lung, abdomen = grey[250:400, 200:330].mean(), grey[800:950, 300:600].mean()
    assert abdomen > lung + 30


def test_preamble_and_meta_header_are_not_needed(dicom: Read) -> None:
    whole = dicom("MR_small_implicit.dcm")
    reference = prepare(whole, limits=LIMITS).png
    after_preamble = whole[132:]
    after_meta = whole[144 + int.from_bytes(whole[140:144], "little") :]
    assert after_meta[:2] == b"\x08\x00"
    assert prepare(after_preamble, limits=LIMITS).png == reference
    assert prepare(after_meta, limits=LIMITS).png == reference


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@given(
    center=st.floats(-500, 500),
    width=st.floats(20, 2000),
    values=st.lists(st.integers(-2000, 2000), min_size=4),
)
@settings(max_examples=40, deadline=None)
def test_windows_are_the_standards(function: str, center: float, width: float, values: list[int]) -> None:
    stored = np.array([values], dtype=np.int16)
    oracle = image_object(stored)
    oracle.WindowCenter, oracle.WindowWidth, oracle.VOILUTFunction = center, width, function
    low, high = -(2**15), 2**15 - 1
    expected = (apply_windowing(stored, oracle) - low) / (high - low)
    shown = Window(float(oracle.WindowCenter), float(oracle.WindowWidth), function).apply(
        stored.astype(np.float64)
    )
    assert np.allclose(shown, expected, atol=1e-6)


def test_a_window_of_width_one_is_a_step() -> None:
    shown = Window(10, 1).apply(np.array([8.0, 9.0, 10.0, 11.0]))
    assert shown.tolist() == [0, 0, 1, 1]


def test_rescale_comes_before_the_window() -> None:
    stored = np.array([[0, 1024, 1064, 2000]], dtype=np.uint16)
    dataset = image_object(stored, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    dataset.WindowCenter, dataset.WindowWidth = 40, 81
    assert pixels(prepare(written(dataset), limits=LIMITS)).tolist() == [[0, 2, 129, 255]]


def test_monochrome1_and_padding_end_up_black() -> None:
    stored = np.array([[0, 100, 255, 7]], dtype=np.uint8)
    dataset = image_object(stored, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=7)
    prepared = prepare(written(dataset), limits=LIMITS)
    assert pixels(prepared).tolist() == [[255, 155, 0, 0]]
    assert prepared.image.recipe.parameters["padding"] is True


def test_padding_does_not_stretch_the_percentiles() -> None:
    stored = np.full((20, 20), -2000, dtype=np.int16)
    stored[:, 10:] = np.arange(200).reshape(20, 10)
    plain = image_object(stored, Modality="MR")
    padded = image_object(stored, Modality="MR", PixelPaddingValue=-2000)
    spread = [pixels(prepare(written(each), limits=LIMITS))[:, 10:].std() for each in (plain, padded)]
    assert spread[1] > 3 * spread[0]


@pytest.mark.parametrize(("body_part", "preset"), [("HEAD", "brain"), ("CHEST", "soft-tissue")])
def test_a_ct_without_a_window_gets_a_named_preset(body_part: str, preset: str) -> None:
    stored = np.arange(400, dtype=np.int16).reshape(20, 20)
    dataset = image_object(
        stored, Modality="CT", RescaleSlope=1, RescaleIntercept=-100, BodyPartExamined=body_part
    )
    dataset.WindowCenter, dataset.WindowWidth = 0, 0  # unusable: LINEAR needs a width of at least 1
    recipe = prepare(written(dataset), limits=LIMITS).image.recipe
    assert recipe.name == f"dicom-ct-{preset}@1"
    assert (recipe.parameters["center"], recipe.parameters["width"]) == (
        CT_PRESETS[preset].center,
        CT_PRESETS[preset].width,
    )


def test_a_window_can_be_asked_for(dicom: Read) -> None:
    data = dicom("CT_small.dcm")
    lung = prepare(data, limits=LIMITS, window="lung")
    assert lung.image.recipe.name == "dicom-ct-lung@1"
    assert lung.png != prepare(data, limits=LIMITS).png
    assert lung.image.recipe.digest != prepare(data, limits=LIMITS).image.recipe.digest
    with pytest.raises(InvalidInput, match=r"soft-tissue, lung, bone, brain"):
        prepare(data, limits=LIMITS, window="liver")
    with pytest.raises(InvalidInput, match="Hounsfield"):
        prepare(dicom("MR_small.dcm"), limits=LIMITS, window="lung")
    with pytest.raises(InvalidInput, match="greyscale"):
        prepare(dicom("US1_UNCR.dcm"), limits=LIMITS, window="lung")


def test_the_middle_frame_is_the_default_and_named(dicom: Read) -> None:
    data = dicom("emri_small.dcm")
    default = prepare(data, limits=LIMITS)
    parameters = default.image.recipe.parameters
    assert (parameters["frame"], parameters["frames"]) == (5, 10)
    assert prepare(data, limits=LIMITS, frame=5).png == default.png
    assert len({prepare(data, limits=LIMITS, frame=frame).png for frame in range(10)}) == 10
    for frame in (-1, 10):
        with pytest.raises(InvalidInput, match="0 to 9"):
            prepare(data, limits=LIMITS, frame=frame)


def test_a_frames_own_functional_group_overrules_the_shared_one(dicom: Read) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom("eCT_Supplemental.dcm")))
    shared = dataset.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    own = Dataset()
    own.WindowCenter, own.WindowWidth = 2000, 10
    dataset.PerFrameFunctionalGroupsSequence[1].FrameVOILUTSequence = [own]
    used = [
        prepare(written(dataset), limits=LIMITS, frame=frame).image.recipe.parameters["center"]
        for frame in (0, 1)
    ]
    assert used == [float(shared.WindowCenter), 2000.0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test-SR.dcm", "Comprehensive SR"),
        ("rtplan.dcm", "RT Plan"),
        ("waveform_ecg.dcm", "ECG"),
        ("nested_priv_SQ.dcm", "zero"),
    ],
)
def test_objects_without_pixels_say_what_they_are(dicom: Read, name: str, kind: str) -> None:
    with pytest.raises(InvalidImage, match=kind):
        prepare(dicom(name), limits=LIMITS)


def test_a_pdf_in_dicom_is_named() -> None:
    dataset = image_object(np.zeros((4, 4), dtype=np.uint8), SOPClassUID=EncapsulatedPDFStorage)
    del dataset.PixelData
    with pytest.raises(InvalidImage, match=r"Encapsulated PDF.*image of the same study"):
        prepare(written(dataset), limits=LIMITS)


def test_syntaxes_that_no_decoder_knows_are_named(dicom: Read) -> None:
    video = image_object(np.zeros((4, 4), dtype=np.uint8))
    video.file_meta.TransferSyntaxUID = MPEG4HP41
    video.PixelData = encapsulate([b"\0" * 16])
    video["PixelData"].is_undefined_length = True
    with pytest.raises(UnsupportedImage, match="MPEG-4"):
        prepare(written(video), limits=LIMITS)
    with pytest.raises(UnsupportedImage, match=r"JPEG Extended.*gdcmconv"):
        prepare(dicom("JPEG-lossy.dcm"), limits=LIMITS)


def test_truncated_pixel_data_is_invalid(dicom: Read) -> None:
    with pytest.raises(InvalidImage, match="incomplete"):
        prepare(dicom("MR_truncated.dcm"), limits=LIMITS)
    with pytest.raises(InvalidImage):
        prepare(dicom("RG1_J2KR.dcm")[:20_000], limits=LIMITS)


def test_sizes_are_checked_before_decoding() -> None:
    huge = image_object(np.zeros((4, 4), dtype=np.uint8), Rows=30_000, Columns=30_000)
    with pytest.raises(ImageTooLarge, match=r"900\.0 megapixels"):
        prepare(written(huge), limits=LIMITS)


def test_a_codestream_larger_than_its_header_claims_is_refused(dicom: Read) -> None:
    # Rows and Columns say 4 x 4, the JPEG 2000 frame says 60000 x 60000, and decoders believe the frame.
    real = pydicom.dcmread(io.BytesIO(dicom("MR_small_jp2klossless.dcm")))
    frame = bytearray(next(pydicom.encaps.generate_frames(real.PixelData, number_of_frames=1)))
    at = frame.index(b"\xff\x4f\xff\x51") + 8
    frame[at : at + 8] = (60_000).to_bytes(4) * 2
    liar = image_object(np.zeros((4, 4), dtype=np.uint16))
    liar.file_meta.TransferSyntaxUID = JPEG2000Lossless
    liar.PixelData = encapsulate([bytes(frame)])
    liar["PixelData"].is_undefined_length = True
    with pytest.raises(ImageTooLarge, match=r"3600\.0 megapixels"):
        prepare(written(liar), limits=LIMITS)


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm"])
@pytest.mark.parametrize("lie", [{"Rows": 3000}, {"Columns": 3}, {"SamplesPerPixel": 3}])
def test_a_header_that_contradicts_its_codestream_is_refused(
    dicom: Read, name: str, lie: dict[str, int]
) -> None:
    # GDCM, given such a file, aborted the whole process.
    dataset = pydicom.dcmread(io.BytesIO(dicom(name)))
    for keyword, value in lie.items():
        setattr(dataset, keyword, value)
    with pytest.raises(InvalidImage, match="another size"):
        prepare(written(dataset), limits=LIMITS)


def test_a_panic_inside_a_decoder_is_an_invalid_image() -> None:
    # Two RLE segments that run beyond the frame: pylibjpeg-rle (Rust) panics, which is no Exception.
    run = b"\x81\x00" * 50
    header = b"".join(number.to_bytes(4, "little") for number in (2, 64, 64 + len(run)))
    liar = image_object(np.zeros((8, 8), dtype=np.uint16))
    liar.file_meta.TransferSyntaxUID = RLELossless
    liar.PixelData = encapsulate([header.ljust(64, b"\0") + run + run])
    liar["PixelData"].is_undefined_length = True
    with pytest.raises(InvalidImage, match="PanicException"):
        prepare(written(liar), limits=LIMITS)


def test_every_compressed_syntax_has_its_decoder_installed() -> None:
    for syntax, plugin in DECODERS.items():
        assert plugin in get_decoder(syntax).available_plugins, syntax.name


def test_a_deflated_bomb_is_refused(dicom: Read) -> None:
    data = dicom("image_dfl.dcm")
    stream = io.BytesIO(data)
    pydicom.filereader.read_preamble(stream, force=False)
    pydicom.filereader.read_dataset(stream, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = data[: stream.tell()] + deflate.compress(bytes(30_000_000)) + deflate.flush()
    assert len(bomb) < 100_000
    with pytest.raises(ImageTooLarge, match="MB"):
        prepare(bomb, limits=Limits(bytes=10_000_000))


IDENTITY = {
    "PatientName": "SECRET^NAME",
    "PatientID": "SECRET-ID",
    "PatientBirthDate": "19000101",
    "AccessionNumber": "SECRET-ACC",
    "StudyInstanceUID": "1.2.826.0.1.99999",
    "InstitutionName": "SECRET HOSPITAL",
    "Modality": "secret typed here",
    "BurnedInAnnotation": "YES",
}


def assert_nothing_leaks(text: str) -> None:
    for value in ("SECRET", "secret", "19000101", "99999"):
        assert value not in text


def test_no_identifier_leaves_the_file(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        dataset = image_object(np.arange(16, dtype=np.uint8).reshape(4, 4), **IDENTITY)
        prepared = prepare(written(dataset), limits=LIMITS, secret=SECRET)
    assert_nothing_leaks(repr(prepared))
    assert_nothing_leaks(prepared.png.decode("latin-1"))
    assert_nothing_leaks(caplog.text)
    assert prepared.image.recipe.parameters["burned_in_annotation"] == "YES"
    assert prepared.tags["Rows"] == 4
    assert prepared.image.modality is None


@pytest.mark.parametrize(
    "broken",
    [{"Rows": 0}, {"BitsStored": 99}, {"SamplesPerPixel": 7}, {"PhotometricInterpretation": "SECRET"}],
)
def test_no_error_quotes_the_file(broken: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    dataset = image_object(np.zeros((4, 4), dtype=np.uint8), **{**IDENTITY, **broken})
    with pytest.raises(HscrError) as refusal:
        prepare(written(dataset), limits=LIMITS, secret=SECRET)
    assert_nothing_leaks(str(refusal.value))
    assert_nothing_leaks(caplog.text)
    assert refusal.value.__cause__ is None
    assert refusal.value.__context__ is None


def test_study_key_groups_a_study_and_needs_the_secret() -> None:
    one, other, none = Dataset(), Dataset(), Dataset()
    one.StudyInstanceUID, other.StudyInstanceUID = "1.2.3", "1.2.4"
    assert study_key(one, SECRET) == study_key(one, SECRET)
    assert len({study_key(one, SECRET), study_key(other, SECRET), study_key(one, SECRET[::-1])}) == 3
    assert study_key(none, SECRET) is None
    with pytest.raises(InvalidConfig, match="16"):
        study_key(one, b"short")


def test_prepare_without_a_secret_gives_no_study(dicom: Read) -> None:
    data = dicom("CT_small.dcm")
    assert prepare(data, limits=LIMITS).study is None
    assert str(prepare(data, limits=LIMITS, secret=SECRET).study).startswith("study_")


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["MR_small.dcm", "MR_small_RLE.dcm", "JPEGLSNearLossless_08.dcm"]), st.data())
def test_damaged_headers_are_decoded_or_refused(name: str, choose: st.DataObject) -> None:
    path = get_testdata_file(name, download=False)
    data = Path(str(path)).read_bytes()
    at = choose.draw(st.integers(0, len(data) - 1))
    damaged = data[:at] + choose.draw(st.binary(max_size=4)) + data[at + 4 :]
    for attempt in (damaged, data[:at]):
        with contextlib.suppress(InvalidImage):
            prepare(attempt, limits=Limits(pixels=1_000_000))
