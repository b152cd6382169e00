"""What may leave a DICOM file besides its pixels: a short list of technical attributes, and a keyed hash.

An allow list, after the Basic Profile of DICOM PS3.15 Annex E: whatever is not named here is dropped, private
elements and sequences always. Cleaning burnt-in text from pixels needs a person (E.3.1), so it is flagged.
"""

import hashlib
import hmac
import re

from pydicom.dataset import Dataset

from hscr.errors import InvalidConfig

KEPT_CODES = ("Modality", "BodyPartExamined", "PhotometricInterpretation", "ViewPosition", "Laterality")
"""Attributes of VR CS that describe the picture; kept only where the value is a code string."""

KEPT_NUMBERS = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsStored")

# PS3.5 §6.2: a CS value. Free text that was typed into the field (a name, a date) does not match.
_CODE = re.compile(r"[A-Z][A-Z0-9_ ]{0,15}")
_MIN_SECRET = 16


def kept_tags(dataset: Dataset) -> dict[str, str | int]:
    """The attributes that may be stored with an answer, by keyword; nothing in them names a person."""
    codes = {keyword: code(dataset, keyword) for keyword in KEPT_CODES}
    numbers = {keyword: dataset.get(keyword) for keyword in KEPT_NUMBERS}
    return {key: value for key, value in codes.items() if value is not None} | {
        key: int(value) for key, value in numbers.items() if isinstance(value, int)
    }


def code(dataset: Dataset, keyword: str) -> str | None:
    """A code string's value, or None where it is absent or no code string."""
    value = dataset.get(keyword)
    return str(value) if isinstance(value, str) and _CODE.fullmatch(value) else None


def burned_in_annotation(dataset: Dataset) -> str:
    """(0028,0301) as YES or NO; UNSTATED where the file does not say, which is no promise of clean pixels."""
    value = code(dataset, "BurnedInAnnotation")
    return value if value in {"YES", "NO"} else "UNSTATED"


def study_key(dataset: Dataset, secret: bytes) -> str | None:
    """HMAC-SHA256 of StudyInstanceUID under the site's secret: groups a study, cannot be turned back into it.

    None where the file has no StudyInstanceUID. Raises InvalidConfig for a secret that could be guessed.
    """
    if len(secret) < _MIN_SECRET:
        raise InvalidConfig(
            f"The secret for study keys is shorter than {_MIN_SECRET} bytes.",
            remedy="Give at least 16 random bytes and keep them: other bytes give other keys.",
        )
    uid = str(dataset.get("StudyInstanceUID") or "").strip()
    return f"study_{hmac.new(secret, uid.encode(), hashlib.sha256).hexdigest()[:32]}" if uid else None
