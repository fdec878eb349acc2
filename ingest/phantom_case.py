"""What a phantom film shows, as plain numbers: the patient's anatomy, how the film was taken, and the findings.

Everything is a pure function of (seed, patient, film) through counter-based random numbers, so any worker can make any
film. Coordinates are the patient's, in half film widths: x grows towards the patient's left (the right of the image,
as films are hung), y towards the feet. A side is "right" or "left" and always the patient's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shards.counter import hash64, uniform

Item = TypeVar("Item")

SIDES = ("right", "left")
LABELS = ("Cardiomegaly", "Edema", "Lung Opacity", "Pleural Effusion", "Pneumothorax", "Support Devices")
"""The findings, spelled and sorted as CheXpert's columns."""

PREVALENCE = {
    "Cardiomegaly": 0.36,
    "Edema": 0.28,
    "Lung Opacity": 0.42,
    "Pleural Effusion": 0.38,
    "Pneumothorax": 0.26,
    "Support Devices": 0.45,
}
"""How often a finding is present in films that are not wholly normal."""

NORMAL_RATE = 0.18
"""Share of films without any finding."""


class Draw:
    """Random numbers in sequence, a pure function of the key: draws for one purpose never shift those for another."""

    _COUNT = 192

    def __init__(self, seed: int, *key: int) -> None:
        self._values = uniform(hash64(seed, *key, np.arange(self._COUNT))).tolist()
        self._next = 0

    def unit(self) -> float:
        """The next number in [0, 1)."""
        self._next += 1
        return self._values[self._next - 1]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.unit() * len(items))]

    def bell(self, spread: float) -> float:
        """A number around 0 with standard deviation `spread`, within three of them (a sum of three uniforms)."""
        return spread * 2.0 * (self.unit() + self.unit() + self.unit() - 1.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """Anatomy that all films of a patient share. Lengths in half film widths."""

    chest: float
    """Half width of the widest lung level, 0.52-0.70."""
    apex: float
    """Height of the lung apex, about -0.7."""
    base: float
    """Height of the diaphragm's domes at full breath, about 0.4."""
    taper: float
    """0: barrel-shaped lungs, 1: narrow at the top."""
    heart: float
    """Half width of a healthy heart relative to `chest`, 0.40-0.50."""
    tilt: float
    """How far the heart leans to the left, 0-1."""
    knob: float
    """Radius of the aortic knob."""
    mediastinum: float
    """Half width of the upper mediastinum."""
    soft: float
    """Thickness of the chest wall: habitus, 0.6 thin to 1.5 obese."""
    breast: float
    """Density of breast shadows, 0 for none."""
    bone: float
    """Density of bones, 0.6-1.3."""
    rib_pitch: float
    """Distance between ribs."""
    rib_slope: float
    """How steeply the posterior ribs fall."""
    curve: float
    """Sideways curve of the spine, signed."""
    dome: float
    """Height of the diaphragm's arch."""
    right_higher: float
    """How much the right dome stands above the left."""
    arms: bool
    """Whether the arms hang inside the film."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """How one film was taken."""

    view: str
    """"PA" or "AP" (portable; the heart is magnified, the breath shallow)."""
    roll: float
    """Rotation in the film plane, radians."""
    turn: float
    """Rotation about the body axis, signed: the mediastinum shifts against the spine."""
    shift: tuple[float, float]
    zoom: float
    breath: float
    """Depth of inspiration, 1 full, 0.75 shallow."""
    level: float
    """Density that comes out mid-grey."""
    gain: float
    """Contrast."""
    noise: float
    """Standard deviation of the noise in grey levels."""
    blur: float
    """Standard deviation of the blur in pixels."""
    bars: tuple[float, float]
    """Share of the film's width and height that is black padding (films that were not square)."""
    collimation: float
    """Share of the film at the border outside the collimated beam."""
    marker: bool
    """Whether an L marker lies at the patient's left shoulder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opacity:
    """A patchy consolidation in one lung, in lung coordinates (0-1 from the midline out, 0-1 from apex to base)."""

    side: str
    across: float
    down: float
    size: float
    strength: float
    grain: float
    """How coarse and broken up it looks, 0-1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effusion:
    """Fluid in the pleural space of one side; `amount` 0 blunts the angle, 1 reaches the hilum."""

    side: str
    amount: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pneumothorax:
    """Air in the pleural space of one side; `depth` is the retraction of the lung relative to its width."""

    side: str
    depth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A tube, line or implant: ett, ng, cvc, picc, pacemaker, drain."""

    kind: str
    side: str
    wobble: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What is wrong, or in the patient, on one film. Empty tuples, None and 0 say: nothing."""

    opacities: tuple[Opacity, ...] = ()
    effusions: tuple[Effusion, ...] = ()
    pneumothorax: Pneumothorax | None = None
    heart: float = 0.0
    """Enlargement of the heart, 0 or 0.40-0.68."""
    edema: float = 0.0
    """Strength of pulmonary edema, 0 or 0.6-1.1."""
    devices: tuple[Device, ...] = ()

    def present(self) -> dict[str, bool]:
        """Truth per label."""
        shown = (self.heart, self.edema, self.opacities, self.effusions, self.pneumothorax, self.devices)
        return dict(zip(LABELS, map(bool, shown), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One film, fully determined."""

    seed: int
    index: int
    patient_index: int
    patient: Patient
    exposure: Exposure
    findings: Findings


_PATIENT, _EXPOSURE, _FINDINGS, _GROUPS = 1, 2, 3, 4
REPORT, TEXTURE = 5, 6


def patient_of_film(samples: int, seed: int) -> np.ndarray:
    """Patient index of each film, int64 (samples,), non-decreasing: 1-5 consecutive films a patient, 1.6 on average."""
    fresh = uniform(hash64(seed, _GROUPS, np.arange(samples))) < 0.62
    fresh[:1] = True
    starts = np.flatnonzero(fresh)
    run = np.arange(samples) - np.repeat(starts, np.diff(np.append(starts, samples)))
    return np.cumsum(fresh | (run % 5 == 0)) - 1


def make_case(seed: int, index: int, patient_index: int) -> Case:
    """The case of film `index`."""
    return Case(
        seed=seed,
        index=index,
        patient_index=patient_index,
        patient=_patient(Draw(seed, _PATIENT, patient_index)),
        exposure=_exposure(Draw(seed, _EXPOSURE, index)),
        findings=_findings(Draw(seed, _FINDINGS, index)),
    )


def _patient(draw: Draw) -> Patient:
    return Patient(
        chest=draw.between(0.52, 0.70),
        apex=draw.between(-0.80, -0.66),
        base=draw.between(0.32, 0.50),
        taper=draw.between(0.0, 0.6),
        heart=draw.between(0.38, 0.47),
        tilt=draw.unit(),
        knob=draw.between(0.05, 0.10),
        mediastinum=draw.between(0.10, 0.16),
        soft=draw.between(0.6, 1.5),
        breast=draw.between(0.05, 0.20) if draw.chance(0.45) else 0.0,
        bone=draw.between(0.6, 1.3),
        rib_pitch=draw.between(0.115, 0.15),
        rib_slope=draw.between(0.10, 0.32),
        curve=draw.bell(0.025),
        dome=draw.between(0.08, 0.20),
        right_higher=draw.between(-0.01, 0.09),
        arms=draw.chance(0.35),
    )


def _exposure(draw: Draw) -> Exposure:
    portable = draw.chance(0.45)
    tall = draw.unit()
    return Exposure(
        view="AP" if portable else "PA",
        roll=draw.bell(0.08 if portable else 0.04),
        turn=draw.bell(0.045 if portable else 0.02),
        shift=(draw.bell(0.06), draw.bell(0.06)),
        zoom=draw.between(0.98, 1.36),
        breath=draw.between(0.74, 0.95) if portable else draw.between(0.86, 1.06),
        level=draw.between(0.66, 0.98),
        gain=draw.between(1.7, 3.2),
        noise=draw.between(2.0, 6.0),
        blur=draw.between(0.4, 1.2),
        bars=(0.0, 0.0) if tall < 0.6 else ((0.12 * draw.unit(), 0.0) if tall < 0.85 else (0.0, 0.10 * draw.unit())),
        collimation=draw.between(0.01, 0.06) if draw.chance(0.3) else 0.0,
        marker=draw.chance(0.6),
    )


def _findings(draw: Draw) -> Findings:
    if draw.chance(NORMAL_RATE):
        return Findings()
    has = {label: draw.chance(rate) for label, rate in PREVALENCE.items()}
    lungs = Pneumothorax(side=draw.pick(SIDES), depth=draw.between(0.3, 0.65)) if has["Pneumothorax"] else None
    effusions = (
        _sided(draw, lambda side: Effusion(side=side, amount=draw.between(0.35, 1.0)))
        if has["Pleural Effusion"]
        else ()
    )
    drained = lungs.side if lungs else (effusions[0].side if effusions else None)
    return Findings(
        opacities=_sided(draw, lambda side: _opacity(draw, side)) if has["Lung Opacity"] else (),
        effusions=effusions,
        pneumothorax=lungs,
        heart=draw.between(0.40, 0.68) if has["Cardiomegaly"] else 0.0,
        edema=draw.between(0.6, 1.1) if has["Edema"] else 0.0,
        devices=_devices(draw, drained) if has["Support Devices"] else (),
    )


def _sided(draw: Draw, make: Callable[[str], Item]) -> tuple[Item, ...]:
    """One of a kind on the right, on the left, or one on each side."""
    roll = draw.unit()
    return tuple(make(side) for side in (SIDES if roll < 0.25 else (draw.pick(SIDES),)))


def _opacity(draw: Draw, side: str) -> Opacity:
    return Opacity(
        side=side,
        across=draw.between(0.35, 0.85),
        down=draw.between(0.12, 0.92),
        size=draw.between(0.18, 0.36),
        strength=draw.between(0.55, 1.0),
        grain=draw.unit(),
    )


def _devices(draw: Draw, drained: str | None) -> tuple[Device, ...]:
    kinds = ["ett", "ng", "cvc", "picc", "pacemaker", "cvc"] + ["drain"] * (3 if drained else 0)
    chosen = dict.fromkeys(draw.pick(kinds) for _ in range(1 + int(draw.unit() * 3)))
    return tuple(_device(draw, kind, drained) for kind in chosen)


def _device(draw: Draw, kind: str, drained: str | None) -> Device:
    usual = "right" if draw.chance(0.7) else "left"
    side = drained if kind == "drain" and drained else ("left" if kind == "pacemaker" and usual == "right" else usual)
    return Device(kind=kind, side=side, wobble=draw.bell(0.5))
