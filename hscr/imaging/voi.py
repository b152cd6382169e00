"""From modality units to grey levels: the value-of-interest step of DICOM's pipeline (PS3.3 C.11.2)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_voi

from hscr.errors import InvalidImage, InvalidInput
from hscr.imaging.deidentify import code

Values = NDArray[Any]


@dataclass(frozen=True)
class Window:
    """Centre and width in modality units (Hounsfield units for CT) and one of the VOI LUT functions."""

    center: float
    width: float
    function: str = "LINEAR"

    @property
    def usable(self) -> bool:
        finite = math.isfinite(self.center) and math.isfinite(self.width)
        narrowest = 1.0 if self.function == "LINEAR" else 1e-6
        return finite and self.width >= narrowest and self.function in {"LINEAR", "LINEAR_EXACT", "SIGMOID"}

    def apply(self, values: Values) -> Values:
        """Grey in [0, 1], PS3.3 C.11.2.1.2.1 and C.11.2.1.3."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (values - self.center) / self.width, -80, 80)
            return 1 / (1 + np.exp(exponent))
        shift = 1.0 if self.function == "LINEAR" else 0.0
        center, width = self.center - shift / 2, self.width - shift
        if width == 0:
            return (values > center).astype(np.float32)
        return np.clip((values - center) / width + 0.5, 0, 1)

    def parameters(self) -> dict[str, Any]:
        return {"center": self.center, "width": self.width, "function": self.function}


CT_PRESETS = {
    "soft-tissue": Window(40, 400),
    "lung": Window(-600, 1500),
    "bone": Window(480, 2500),
    "brain": Window(40, 80),
}
"""Customary CT windows in Hounsfield units, by the name that `window` takes."""

_HEAD = {"HEAD", "BRAIN", "SKULL"}


def tone(
    values: Values, shown: NDArray[np.bool_], frame: Dataset, window: str | None
) -> tuple[Values, str, dict[str, Any]]:
    """Grey in [0, 1] with the recipe's name and parameters.

    Args:
        values: modality units, any shape.
        shown: same shape, False where a pixel is padding.
        frame: attributes of this frame, functional groups resolved.
        window: a name of `CT_PRESETS` that overrules the file, or None.

    The order is: the preset asked for; the file's VOI LUT; its window; a CT preset by body part; the stored
    range for up to 8 bits; percentiles of the shown pixels.
    """
    if window is not None:
        return _preset(values, _asked(window, frame))
    if frame.get("VOILUTSequence"):
        return _lookup(values, frame), "dicom-voi@1", {"voi": "lut"}
    own = _file_window(frame)
    if own is not None and own.usable:
        return own.apply(values), "dicom-voi@1", {"voi": "window", **own.parameters()}
    if _hounsfield(frame):
        return _preset(values, "brain" if code(frame, "BodyPartExamined") in _HEAD else "soft-tissue")
    if frame.BitsStored <= 8 and not frame.get("RescaleSlope") and not frame.PixelRepresentation:
        return values / ((1 << frame.BitsStored) - 1), "dicom-stored-range@1", {"bits": int(frame.BitsStored)}
    return _percentiles(values, shown)


def _asked(window: str, frame: Dataset) -> str:
    if window not in CT_PRESETS:
        raise InvalidInput(
            "There is no window of that name.", remedy=f"Choose one of {', '.join(CT_PRESETS)}."
        )
    if not _hounsfield(frame):
        raise InvalidInput(
            "The named windows are in Hounsfield units, and this image is no rescaled CT.",
            remedy="Leave the window out: the file's own is used.",
        )
    return window


def _hounsfield(frame: Dataset) -> bool:
    rescaled = frame.get("RescaleIntercept") is not None or bool(frame.get("ModalityLUTSequence"))
    return code(frame, "Modality") == "CT" and rescaled


def _preset(values: Values, name: str) -> tuple[Values, str, dict[str, Any]]:
    preset = CT_PRESETS[name]
    return preset.apply(values), f"dicom-ct-{name}@1", {"voi": "preset", **preset.parameters()}


def _file_window(frame: Dataset) -> Window | None:
    center, width = (_first(frame.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    return Window(float(center), float(width), str(frame.get("VOILUTFunction") or "LINEAR"))


def _first(value: Any) -> Any:
    if isinstance(value, MultiValue):
        return value[0] if len(value) else None
    return value


def _lookup(values: Values, frame: Dataset) -> Values:
    entries, first, bits = (int(number) for number in frame.VOILUTSequence[0].LUTDescriptor)
    # Clipped here, for apply_voi wraps around where an index exceeds the table's own integer type.
    last = first + (entries or 1 << 16) - 1
    indices = np.clip(np.rint(values), first, last).astype(np.int32)
    return apply_voi(indices, frame).astype(np.float32) / ((1 << bits) - 1)


def _percentiles(values: Values, shown: NDArray[np.bool_]) -> tuple[Values, str, dict[str, Any]]:
    parameters = {"low": 0.5, "high": 99.5}
    if not shown.any():
        raise InvalidImage("The image is nothing but padding.", remedy="Send a frame that shows something.")
    low, high = np.percentile(values[shown], (parameters["low"], parameters["high"]))
    grey = (
        np.clip((values - low) / (high - low), 0, 1)
        if high > low
        else np.zeros_like(values, dtype=np.float32)
    )
    return grey, "dicom-percentile@1", parameters
