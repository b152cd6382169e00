"""DICOM part 10 to upright 8-bit pixels, and nothing else out of the file.

The order is the standard's (PS3.4 N.2.1, PS3.3 C.11): modality LUT or rescale, VOI LUT or window, MONOCHROME1
inverted. Colour is converted to RGB. Overlays and presentation states are not drawn.
"""

import io
import logging
import warnings
import zlib
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder, pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    UID_dictionary,
)

from hscr.errors import InvalidImage, InvalidInput, UnsupportedImage
from hscr.imaging.deidentify import burned_in_annotation, code, kept_tags, study_key
from hscr.imaging.guard import Limits, require_bytes, require_pixels
from hscr.imaging.headers import codestream_shape
from hscr.imaging.recipes import OUTPUT, Pixels
from hscr.imaging.voi import tone

# pydicom quotes element values in its warnings and log lines; none of them may reach a log (PHI).
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\b")

_TONE = (
    "Modality", "BodyPartExamined", "BitsStored", "PixelRepresentation", "PhotometricInterpretation",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
)  # fmt: skip
# One decoder for each syntax: a lossy picture differs between decoders, and GDCM, which aborts the process on
# some damaged streams, is used only where there is no other.
DECODERS = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
    RLELossless: "pylibjpeg",
}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_MONOCHROME = {"MONOCHROME1", "MONOCHROME2"}


def read(
    data: bytes, limits: Limits, *, frame: int | None, window: str | None, secret: bytes | None
) -> Pixels:
    """Decode one frame.

    Args:
        data: the file's bytes, with or without preamble.
        limits: checked against the header and the compressed frame's own header before decoding.
        frame: 0-based; None takes the middle one (`frames // 2`), and the recipe says which it was.
        window: a name of `voi.CT_PRESETS`; None follows the file.
        secret: key of the study hash; None computes none.

    Raises InvalidImage, ImageTooLarge, UnsupportedImage, InvalidInput; a parser's own exceptions pass
    through for `guarded`. No message holds a value of the file.
    """
    dataset = _parse(data, limits)
    index, frames = _frame(dataset, frame)
    _require_decodable(dataset, index, frames, limits)
    stored = _decoded(dataset, index)
    image, name, parameters = _picture(stored, dataset, index, window)
    shared = {
        **OUTPUT,
        "frame": index,
        "frames": frames,
        "photometric_interpretation": str(dataset.PhotometricInterpretation),
        "burned_in_annotation": burned_in_annotation(dataset),
    }
    study = None if secret is None else study_key(dataset, secret)
    return Pixels(image, name, shared | parameters, code(dataset, "Modality"), study, kept_tags(dataset))


def _parse(data: bytes, limits: Limits) -> Dataset:
    _require_inflatable(data, limits)
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if "PixelData" not in dataset:
        raise _without_pixels(dataset)
    require_pixels(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), limits)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = _implied_syntax(dataset)
    return dataset


def _require_inflatable(data: bytes, limits: Limits) -> None:
    """A deflated data set (PS3.5 A.5) is inflated whole by the parser, so its size is measured first."""
    stream = io.BytesIO(data)
    read_preamble(stream, force=True)
    meta = read_dataset(
        stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2
    )
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(), limits.bytes + 1)
        require_bytes(len(inflated), limits)


def _without_pixels(dataset: Dataset) -> InvalidImage:
    kind = UID_dictionary.get(str(dataset.get("SOPClassUID") or ""))
    what = f"a {kind[0]} object" if kind else "an object of unknown kind"
    return InvalidImage(
        f"The DICOM file is {what} and holds no pixel data.",
        remedy="Send an image of the same study; reports, PDFs, plans and waveforms cannot be looked at.",
    )


def _implied_syntax(dataset: Dataset) -> UID:
    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _frame(dataset: Dataset, asked: int | None) -> tuple[int, int]:
    frames = max(1, int(dataset.get("NumberOfFrames") or 1))
    index = frames // 2 if asked is None else asked
    if not 0 <= index < frames:
        raise InvalidInput(
            f"The image has {frames} frame(s), counted from 0.",
            remedy=f"Ask for a frame from 0 to {frames - 1}.",
        )
    return index, frames


def _require_decodable(dataset: Dataset, index: int, frames: int, limits: Limits) -> None:
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise _undecodable(syntax)
    if syntax.is_encapsulated:
        _require_honest_codestream(dataset, index, frames, limits)


def _decoded(dataset: Dataset, index: int) -> NDArray[Any]:
    """Stored values, [rows, columns] or [rows, columns, 3]; YBR becomes RGB."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    try:
        return pixel_array(dataset, index=index, decoding_plugin=DECODERS.get(syntax, ""))
    except RuntimeError:  # pydicom: the decoder gave up
        refusal = _undecodable(syntax)
    raise refusal


def _undecodable(syntax: UID) -> UnsupportedImage:
    name = syntax.name if syntax in UID_dictionary else "an unknown one"
    return UnsupportedImage(
        f"The DICOM pixel data cannot be decoded: its transfer syntax is {name}, "
        "and it is damaged or of a variant that no decoder here knows (such as video or 12-bit lossy JPEG).",
        remedy="Convert it to Explicit VR Little Endian (for example with gdcmconv --raw) and send that.",
    )


def _require_honest_codestream(dataset: Dataset, index: int, frames: int, limits: Limits) -> None:
    """The compressed frame has a header of its own, which decoders obey rather than Rows and Columns."""
    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    stream = get_frame(dataset.PixelData, index, number_of_frames=frames, extended_offsets=offsets)
    shape = codestream_shape(stream)
    if shape is None:
        return
    require_pixels(shape[0], shape[1], limits)
    if shape != (dataset.Columns, dataset.Rows, dataset.SamplesPerPixel):
        raise InvalidImage(
            "The compressed frame has another size than the DICOM header says.",
            remedy="Export it again from its source.",
        )


def _picture(
    stored: NDArray[Any], dataset: Dataset, index: int, window: str | None
) -> tuple[Image.Image, str, dict[str, Any]]:
    photometric = dataset.PhotometricInterpretation
    if photometric in _MONOCHROME:
        return _monochrome(stored, dataset, index, window)
    if window is not None:
        raise InvalidInput("A window applies to greyscale images only.", remedy="Leave the window out.")
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)[..., :3]
        return _rgb(colours, 8 * colours.dtype.itemsize), "dicom-palette@1", {}
    if photometric in _COLOUR:
        return _rgb(stored, int(dataset.BitsStored)), "dicom-colour@1", {}
    raise UnsupportedImage(
        "The photometric interpretation is not supported.",
        remedy="Send greyscale, RGB, YBR or palette colour.",
    )


def _monochrome(
    stored: NDArray[Any], dataset: Dataset, index: int, window: str | None
) -> tuple[Image.Image, str, dict[str, Any]]:
    frame = _frame_attributes(dataset, index)
    shown = ~_padding(stored, dataset)
    values = apply_modality_lut(stored, frame).astype(np.float32)
    grey, name, parameters = tone(values, shown, frame, window)
    if not np.isfinite(grey).all():
        raise InvalidImage("The image's rescale or window is not finite.", remedy="Export it again.")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    return (
        Image.fromarray(np.where(shown, _byte(grey), np.uint8(0))),
        name,
        parameters | {"padding": bool((~shown).any())},
    )


def _frame_attributes(dataset: Dataset, index: int) -> Dataset:
    """What the greyscale pipeline needs, from the data set and its functional groups (PS3.3 C.7.6.16)."""
    frame = Dataset()
    frame.file_meta = FileMetaDataset(dataset.file_meta)
    groups = [dataset]
    for sequence, at in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        for group in (dataset.get(sequence) or [])[at : at + 1]:
            groups += [*(group.get("PixelValueTransformationSequence") or [])[:1]]
            groups += [*(group.get("FrameVOILUTSequence") or [])[:1]]
    for group in groups:
        for keyword in _TONE:
            if keyword in group:
                frame.add(group[keyword])
    return frame


def _padding(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """True where a stored value is (0028,0120) PixelPaddingValue or in its range (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(stored.shape, dtype=np.bool_)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return np.asarray((stored >= low) & (stored <= high))


def _rgb(values: NDArray[Any], bits: int) -> Image.Image:
    return Image.fromarray(values if bits == 8 else _byte(values / ((1 << bits) - 1)))


def _byte(unit: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
