"""Write the report of a phantom film and its labels, so that the two agree.

A finding is stated, denied, hedged or not mentioned; the label column says 1, 0, -1 or nothing, as CheXpert's labeller
would read the text. What is stated is on the film; what is denied or not mentioned is not. A hedge settles nothing.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ingest.phantom_canvas import Draw
from ingest.phantom_case import LABELS, REPORT, Case, Device, Opacity

_PHRASES = tomllib.loads((Path(__file__).parent / "phantom.toml").read_text(encoding="utf-8"))
_YES, _NO, _MAYBE = 1, 0, -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The text of a report and what it says of each label."""

    text: str
    labels: dict[str, int | None]
    """Per label 1 stated, 0 denied, -1 hedged, None not mentioned."""


def write_report(case: Case) -> Report:
    """The report of a case, a pure function of it."""
    draw = Draw(case.seed, REPORT, case.index)
    labels = _choose(case, draw)
    sentences = [_state(case, label, draw) for label in LABELS if labels[label] == _YES]
    sentences += [_hedge(label, draw) for label in LABELS if labels[label] == _MAYBE]
    sentences = _shuffled(sentences + _deny([label for label in LABELS if labels[label] == _NO], draw), draw)
    if (
        not any(case.findings.present().values())
        and _MAYBE not in labels.values()
        and (not sentences or draw.chance(0.4))
    ):
        sentences.append(draw.pick(_PHRASES["normal"]))
    sentences = _setting(case, draw) + sentences + ([draw.pick(_PHRASES["fillers"])] if draw.chance(0.12) else [])
    return Report(text=_layout(sentences, draw), labels=labels)


def _choose(case: Case, draw: Draw) -> dict[str, int | None]:
    """What the report says of each finding. Present ones are nearly always stated, others as the writer pleases."""
    thorough = draw.pick((0.4, 0.9, 1.0))
    labels: dict[str, int | None] = {}
    for label, present in case.findings.present().items():
        hedged, told = draw.chance(0.04) and label != "Support Devices", draw.chance(thorough)
        labels[label] = _MAYBE if hedged else _YES if present else _NO if told else None
    return labels


def _state(case: Case, label: str, draw: Draw) -> str:
    """One finding, as a sentence or a few."""
    f = case.findings
    if label == "Support Devices":
        return _tubes(f.devices, draw)
    sentence = draw.pick(_PHRASES["stated"][label])
    if label == "Cardiomegaly":
        return _fill(sentence, degree=_grade(f.heart, 0.48, 0.58, ("mild", "moderate", "marked")))
    if label == "Edema":
        return _fill(sentence, degree=_grade(f.edema, 0.76, 0.94, ("mild", "moderate", "severe")))
    if label == "Lung Opacity":
        return _fill(sentence, patch=draw.pick(_PHRASES["patches"]), where=_where(f.opacities))
    if label == "Pleural Effusion":
        size = _grade(max(e.amount for e in f.effusions), 0.5, 0.8, ("small", "moderate", "large"))
        return _fill(sentence, size=size, **_sides([e.side for e in f.effusions]))
    assert f.pneumothorax is not None
    size = _grade(f.pneumothorax.depth, 0.4, 0.52, ("small", "moderate", "large"))
    return _fill(sentence, size=size, sides=f.pneumothorax.side)


def _grade(value: float, low: float, high: float, words: tuple[str, str, str]) -> str:
    return words[(value >= low) + (value >= high)]


def _sides(sides: list[str]) -> dict[str, str]:
    """The words that depend on one side or both."""
    if len(sides) > 1:
        return {"sides": "bilateral", "place": "on both sides", "effusion": "effusions"}
    return {"sides": sides[0], "place": f"on the {sides[0]}", "effusion": "effusion"}


def _where(opacities: tuple[Opacity, ...]) -> str:
    """ "left lower lung", or "both lungs" with the zones where they agree."""
    zones = [_grade(o.down, 0.36, 0.66, ("upper", "mid", "lower")) for o in opacities]
    if len(opacities) == 1:
        return f"{opacities[0].side} {zones[0]} lung"
    return f"bilateral {zones[0]} lungs" if zones[0] == zones[1] else f"right {zones[0]} and left {zones[1]} lung"


def _tubes(devices: tuple[Device, ...], draw: Draw) -> str:
    told = [_fill(draw.pick(_PHRASES["devices"][d.kind]), side=d.side) for d in devices[:2]]
    return draw.pick(_PHRASES["all_devices"]) if draw.chance(0.35) else " ".join(told)


def _fill(template: str, **slots: str) -> str:
    return _capital(template.format(**slots))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _hedge(label: str, draw: Draw) -> str:
    return _capital(draw.pick(_PHRASES["hedges"]).format(_PHRASES["nouns"][label][0]))


def _deny(labels: list[str], draw: Draw) -> list[str]:
    """Denials: a finding in a sentence of its own, or two that share one."""
    alone = [label for label in labels if draw.chance(0.8)]
    shared = _shuffled([draw.pick(_PHRASES["nouns"][label]) for label in labels if label not in alone], draw)
    pairs = [" or ".join(shared[start : start + 2]) for start in range(0, len(shared), 2)]
    return [draw.pick(_PHRASES["alone"][label]) for label in alone] + [
        draw.pick(_PHRASES["denials"]).format(pair) for pair in pairs
    ]


def _setting(case: Case, draw: Draw) -> list[str]:
    """What a report may say before its findings: the view, the breath, the position."""
    e, told = case.exposure, []
    if draw.chance(0.25):
        told.append(
            draw.pick(
                ("AP portable view.", "Portable chest radiograph.")
                if e.view == "AP"
                else ("PA view of the chest.", "Upright PA radiograph.")
            )
        )
    if e.breath < 0.82 and draw.chance(0.5):
        told.append(draw.pick(("Low lung volumes.", "Shallow inspiration.")))
    if abs(e.roll) > 0.12 and draw.chance(0.5):
        told.append("The film is rotated.")
    return told


def _shuffled(items: list[str], draw: Draw) -> list[str]:
    return [item for _, item in sorted((draw.unit(), item) for item in items)]


def _layout(sentences: list[str], draw: Draw) -> str:
    """Prose, a numbered list, a headed paragraph, or capitals."""
    styles: tuple[Callable[[list[str]], str], ...] = (_prose, _prose, _prose, _numbered, _headed, _loud)
    return draw.pick(styles)(sentences)


def _prose(sentences: list[str]) -> str:
    return " ".join(sentences)


def _numbered(sentences: list[str]) -> str:
    return " ".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, start=1))


def _headed(sentences: list[str]) -> str:
    return "IMPRESSION: " + " ".join(sentences)


def _loud(sentences: list[str]) -> str:
    return " ".join(sentences).upper()
