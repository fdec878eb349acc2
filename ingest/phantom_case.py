"""What a phantom film shows, as plain numbers: the patient's anatomy, how the film was taken, and the findings.

Everything is a pure function of (seed, patient, film) through counter-based random numbers, so any worker can make any
film. Coordinates are the patient's, in half film widths: x grows towards the patient's left (the right of the image,
as films are hung), y towards the feet. A side is "right" or "left" and always the patient's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ingest.phantom_canvas import Draw, Exposure, Item, draw_exposure
from shards.counter import hash64, uniform

SIDES = ("right", "left")
PREVALENCE = {
    "Cardiomegaly": 0.36,
    "Edema": 0.28,
    "Lung Opacity": 0.42,
    "Pleural Effusion": 0.38,
    "Pneumothorax": 0.26,
    "Support Devices": 0.45,
}
"""How often a finding is present in films that are not drawn as normal; spelled as CheXpert's columns."""
LABELS = tuple(PREVALENCE)

NORMAL_RATE = 0.18
"""Share of films drawn as normal; one in fifteen of the others comes out without a finding too."""


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
    """Half width of a healthy heart relative to `chest`, 0.38-0.47."""
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
REPORT = 5


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
        exposure=draw_exposure(Draw(seed, _EXPOSURE, index)),
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
    side = {"drain": drained, "pacemaker": "left"}.get(kind) or usual
    return Device(kind=kind, side=side, wobble=draw.bell(0.5))
