"""Synthetic medical images ("phantoms") whose every fact is known.

A phantom is one study with at most one finding. The picture is a pure function of the `Phantom`: discrete
facts are its fields, everything else (pose, intensity, noise) comes from its seed. Nothing here is a patient.

Orientation follows the radiological convention: the patient's left is on the right of the picture. Head
studies are axial with the face up; chest and abdominal studies are coronal with the head up.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 112
"""Edge of every phantom in pixels."""

Pixels = NDArray[np.float32]
Pattern = tuple[Pixels, Pixels]

SIDES = ("left", "right")
SIZES = ("small", "large")


@dataclass(frozen=True)
class Study:
    """A kind of examination: what it is called, what it shows and what may be wrong in it."""

    name: str
    modality: str
    organ: str
    findings: tuple[str, ...]


STUDIES = {
    study.name: study
    for study in (
        Study(
            "chest radiograph", "radiograph", "lungs", ("consolidation", "nodule", "effusion", "pneumothorax")
        ),
        Study("chest CT", "CT", "lungs", ("nodule", "consolidation", "effusion")),
        Study("abdominal CT", "CT", "kidneys", ("stone", "cyst", "mass")),
        Study("head CT", "CT", "brain", ("hemorrhage", "infarct", "tumor")),
        Study("brain MR", "MR", "brain", ("tumor", "infarct", "hemorrhage")),
        Study("abdominal ultrasound", "ultrasound", "kidneys", ("cyst", "stone", "hydronephrosis")),
    )
}
FINDINGS = tuple(sorted({finding for study in STUDIES.values() for finding in study.findings}))
LOCATIONS = {
    "lungs": ("upper", "middle", "lower"),
    "kidneys": ("upper", "middle", "lower"),
    "brain": ("frontal", "parietal", "occipital"),
}


@dataclass(frozen=True)
class Phantom:
    """One synthetic study. `finding` and its side, size and location are either all given or all `None`."""

    seed: int
    study: str
    finding: str | None = None
    side: str | None = None
    size: str | None = None
    location: str | None = None

    def __post_init__(self) -> None:
        kind = STUDIES.get(self.study)
        if kind is None:
            raise ValueError(f"unknown study {self.study!r}; choose one of {', '.join(STUDIES)}")
        facts = (self.finding, self.side, self.size, self.location)
        if all(fact is None for fact in facts):
            return
        allowed = (kind.findings, SIDES, SIZES, LOCATIONS[kind.organ])
        if not all(fact in choices for fact, choices in zip(facts, allowed, strict=True)):
            raise ValueError(f"{facts} is no finding of a {self.study}; choose one of each of {allowed}")


def render(phantom: Phantom) -> Image.Image:
    """The phantom's picture: 8-bit greyscale, `IMAGE_SIZE` square, the same bytes for the same phantom."""
    pixels, _ = draw(phantom)
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def photograph(phantom: Phantom) -> bytes:
    """`render` as a PNG file."""
    buffer = io.BytesIO()
    render(phantom).save(buffer, format="PNG")
    return buffer.getvalue()


def draw(phantom: Phantom) -> tuple[Pixels, Pixels]:
    """Picture and lesion opacity, both [IMAGE_SIZE, IMAGE_SIZE] in [0, 1]; no finding, no opacity."""
    rng = np.random.default_rng(phantom.seed)
    x, y = _posed_grid(rng)
    picture = _BACKGROUNDS[phantom.study](x, y, rng)
    opacity = np.zeros_like(picture)
    if phantom.finding is not None:
        opacity, value = _lesion(phantom, x, y, rng)
        picture += opacity * (value - picture)
    return _acquire(picture, STUDIES[phantom.study].modality, rng), opacity


def _posed_grid(rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Anatomical coordinates of each pixel, about [-1, 1], after a small rotation, scaling and shift."""
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    angle, scale = rng.uniform(-0.1, 0.1), rng.uniform(0.94, 1.08)
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    cos, sin = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    column, row = axis[None, :] - np.float32(dx), axis[:, None] - np.float32(dy)
    return cos * column - sin * row, sin * column + cos * row


def _acquire(picture: Pixels, modality: str, rng: np.random.Generator) -> Pixels:
    """What a scanner adds: gain, gamma and noise (speckle for ultrasound)."""
    gain, gamma = np.float32(rng.uniform(0.85, 1.1)), np.float32(rng.uniform(0.85, 1.2))
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0.015, 0.05))
    exposed = np.clip(picture, 0, 1) ** gamma * gain
    exposed = exposed * (1 + 4 * noise) if modality == "ultrasound" else exposed + noise
    return _float32(np.clip(exposed, 0, 1))


def _ellipse(
    x: Pixels, y: Pixels, centre: tuple[float, float], radii: tuple[float, float], soft: float
) -> Pixels:
    """1 inside, 0 outside, a linear ramp about `soft` wide on the edge."""
    distance = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    opacity: Pixels = np.clip((1 - distance) * (min(radii) / soft) + 0.5, 0, 1)
    return opacity


def _float32(values: NDArray[np.floating]) -> Pixels:
    return values.astype(np.float32, copy=False)


def _paint(picture: Pixels, opacity: Pixels, value: float) -> None:
    picture += opacity * (np.float32(value) - picture)


def _pair(
    x: Pixels, y: Pixels, centre: tuple[float, float], radii: tuple[float, float], soft: float
) -> Pixels:
    """The same ellipse on both sides of the midline."""
    return _ellipse(np.abs(x), y, centre, radii, soft)


def _chest_radiograph(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    picture = np.full_like(x, 0.1)
    _paint(picture, _ellipse(x, y, (0, 0.15), (1.0, 1.1), 0.15), 0.6)
    _paint(picture, _pair(x, y, (0.42, -0.02), (0.31, 0.68), 0.1), rng.uniform(0.2, 0.3))
    _paint(picture, np.clip(1 - np.abs(x) / 0.12, 0, 1), 0.75)
    _paint(picture, _ellipse(x, y, (0.14, 0.36), (0.27, 0.26), 0.12), 0.78)
    ribs = np.sin((y + 0.35 * np.abs(x)) * np.float32(rng.uniform(19, 23)))
    return _float32(picture + 0.05 * ribs)


def _chest_ct(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    picture = np.full_like(x, 0.0)
    _paint(picture, _ellipse(x, y, (0, 0.1), (0.95, 1.2), 0.04), 0.5)
    _paint(picture, _pair(x, y, (0.43, -0.02), (0.33, 0.7), 0.04), rng.uniform(0.08, 0.14))
    _paint(picture, _ellipse(x, y, (0.14, 0.3), (0.3, 0.3), 0.05), 0.6)
    vessels = np.sin(x * 23 + rng.uniform(0, 6)) * np.sin(y * 19 + rng.uniform(0, 6))
    return _float32(picture + 0.05 * vessels)


def _abdominal_ct(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    picture = np.full_like(x, 0.0)
    _paint(picture, _ellipse(x, y, (0, 0), (0.92, 1.3), 0.04), 0.35)
    _paint(picture, _ellipse(x, y, (-0.4, -0.85), (0.5, 0.35), 0.05), 0.48)
    _paint(picture, np.clip((0.13 - np.abs(x)) / 0.04, 0, 1), 0.85)
    _paint(picture, _pair(x, y, (0.46, 0.05), (0.23, 0.52), 0.05), rng.uniform(0.52, 0.6))
    bowel = np.sin(x * 9 + rng.uniform(0, 6)) * np.sin(y * 11 + rng.uniform(0, 6))
    return _float32(picture + 0.03 * bowel)


def _head_ct(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    picture = np.full_like(x, 0.0)
    _paint(picture, _ellipse(x, y, (0, 0), (0.8, 0.95), 0.03), 0.98)
    _paint(picture, _ellipse(x, y, (0, 0), (0.72, 0.87), 0.03), rng.uniform(0.45, 0.52))
    _paint(picture, _pair(x, y, (0.09, -0.02), (0.06, 0.25), 0.05), 0.2)
    return picture


def _brain_mr(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    picture = np.full_like(x, 0.02)
    _paint(picture, _ellipse(x, y, (0, 0), (0.82, 0.96), 0.05), 0.55)
    _paint(picture, _ellipse(x, y, (0, 0), (0.77, 0.91), 0.04), 0.05)
    _paint(picture, _ellipse(x, y, (0, 0), (0.72, 0.86), 0.05), rng.uniform(0.4, 0.46))
    folds = np.sin(np.arctan2(y, x) * 26 + rng.uniform(0, 6))
    _paint(picture, _ellipse(x, y, (0, 0), (0.58, 0.7), 0.12), 0.52)
    _paint(picture, _pair(x, y, (0.09, -0.02), (0.06, 0.25), 0.05), 0.08)
    rim = _ellipse(x, y, (0, 0), (0.7, 0.84), 0.05) - _ellipse(x, y, (0, 0), (0.6, 0.72), 0.1)
    return _float32(picture + 0.08 * folds * rim)


def _abdominal_ultrasound(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    depth = np.sqrt(x**2 + (y + 1.5) ** 2)
    fan = np.clip((2.45 - depth) / 0.04, 0, 1) * np.clip((y + 1.5 - 1.05 * np.abs(x)) / 0.04, 0, 1)
    fan *= np.clip((depth - 0.55) / 0.04, 0, 1)
    picture = np.full_like(x, rng.uniform(0.3, 0.36))
    picture += np.float32(0.05) * np.sin(depth * np.float32(rng.uniform(12, 16)))
    _paint(picture, _pair(x, y, (0.46, 0.05), (0.25, 0.52), 0.06), 0.46)
    _paint(picture, _pair(x, y, (0.44, 0.05), (0.05, 0.4), 0.08), 0.6)
    return _float32(picture * fan)


_BACKGROUNDS: dict[str, Callable[[Pixels, Pixels, np.random.Generator], Pixels]] = {
    "chest radiograph": _chest_radiograph,
    "chest CT": _chest_ct,
    "abdominal CT": _abdominal_ct,
    "head CT": _head_ct,
    "brain MR": _brain_mr,
    "abdominal ultrasound": _abdominal_ultrasound,
}
_SITES = {
    "upper": (0.43, -0.33),
    "middle": (0.45, 0.03),
    "lower": (0.43, 0.38),
    "frontal": (0.3, -0.47),
    "parietal": (0.42, 0.0),
    "occipital": (0.3, 0.47),
}
_RADII = {"small": (0.085, 0.105), "large": (0.155, 0.19)}


def _lesion(phantom: Phantom, x: Pixels, y: Pixels, rng: np.random.Generator) -> Pattern:
    """Opacity and grey value of the phantom's finding, both [IMAGE_SIZE, IMAGE_SIZE]."""
    assert phantom.location is not None
    assert phantom.size is not None
    assert phantom.finding is not None
    across, down = _SITES[phantom.location]
    facing = 1 if phantom.side == "left" else -1
    radius = rng.uniform(*_RADII[phantom.size])
    u = (x - facing * (across + rng.uniform(-0.06, 0.06))) / np.float32(radius)
    v = (y - (down + rng.uniform(-0.06, 0.06))) / np.float32(radius)
    if phantom.finding not in _UPRIGHT:
        u, v = _turned(u, v, rng.uniform(0, 2 * np.pi))
    modality = STUDIES[phantom.study].modality
    opacity, value = _PATTERNS.get((phantom.finding, modality), _PATTERNS[phantom.finding, ""])(u, v)
    return _float32(opacity * rng.uniform(0.8, 1.0)), _float32(value)


def _turned(u: Pixels, v: Pixels, angle: float) -> tuple[Pixels, Pixels]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * u - sin * v, sin * u + cos * v


def _disc(u: Pixels, v: Pixels, soft: float = 0.2) -> Pixels:
    return _ellipse(u, v, (0, 0), (1, 1), soft)


def _nodule(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v), np.full_like(u, 0.9)


def _consolidation(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v, 0.9), _float32(0.6 + 0.3 * np.sin(5 * u) * np.sin(5 * v))


def _effusion(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v) * np.clip(v * 5 + 0.5, 0, 1), np.full_like(u, 0.8)


def _pneumothorax(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v), _float32(0.85 * (1 - _disc(u / 0.75, v / 0.75)))


def _mass(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v), _float32(0.6 + 0.4 * np.sign(u) * np.sign(v))


def _cyst(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v), np.full_like(u, 0.08)


def _stone(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u / 0.7, (v + 0.3) / 0.6, 0.3), np.full_like(u, 1.0)


def _shadowing_stone(u: Pixels, v: Pixels) -> Pattern:
    core, bright = _stone(u, v)
    shadow = np.clip((0.5 - np.abs(u)) * 5, 0, 1) * np.clip(v * 5, 0, 1) * np.clip((1.2 - v) * 5, 0, 1)
    return np.maximum(core, shadow), np.where(core > shadow, bright, np.float32(0.05))


def _hydronephrosis(u: Pixels, v: Pixels) -> Pattern:
    lobes = 0.72 + 0.38 * np.cos(3 * np.arctan2(v, u))
    return _disc(u / lobes, v / lobes, 0.3), np.full_like(u, 0.05)


def _bright_bleed(u: Pixels, v: Pixels) -> Pattern:
    return _ellipse(u, v, (0, 0), (1.1, 0.7), 0.2), np.full_like(u, 0.92)


def _dark_bleed(u: Pixels, v: Pixels) -> Pattern:
    return _ellipse(u, v, (0, 0), (1.1, 0.7), 0.2), np.full_like(u, 0.02)


def _wedge(u: Pixels, v: Pixels) -> Pixels:
    return _disc(u, v, 0.3) * np.clip((0.75 * (u + 0.8) - np.abs(v)) * 3 + 0.5, 0, 1)


def _dark_infarct(u: Pixels, v: Pixels) -> Pattern:
    return _wedge(u, v), np.full_like(u, 0.12)


def _bright_infarct(u: Pixels, v: Pixels) -> Pattern:
    return _wedge(u, v), np.full_like(u, 0.9)


def _tumor(u: Pixels, v: Pixels) -> Pattern:
    return _disc(u, v), _float32(0.9 - 0.75 * _disc(u / 0.6, v / 0.6, 0.25))


_UPRIGHT = {"effusion", "stone"}
"""What follows gravity or the beam, so that it never lies turned."""
_PATTERNS: dict[tuple[str, str], Callable[[Pixels, Pixels], Pattern]] = {
    ("consolidation", ""): _consolidation,
    ("cyst", ""): _cyst,
    ("effusion", ""): _effusion,
    ("hemorrhage", ""): _bright_bleed,
    ("hemorrhage", "MR"): _dark_bleed,
    ("hydronephrosis", ""): _hydronephrosis,
    ("infarct", ""): _dark_infarct,
    ("infarct", "MR"): _bright_infarct,
    ("mass", ""): _mass,
    ("nodule", ""): _nodule,
    ("pneumothorax", ""): _pneumothorax,
    ("stone", ""): _stone,
    ("stone", "ultrasound"): _shadowing_stone,
    ("tumor", ""): _tumor,
}
"""How a finding looks (opacity, grey value) in lesion radii about its centre; by modality where it varies."""
