"""Write the report of a phantom film and its labels, so that the two agree.

A finding is stated, denied, hedged or not mentioned; the label column says 1, 0, -1 or nothing, as CheXpert's labeller
would read the text. What is stated is on the film; what is denied or not mentioned is not. A hedge settles nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ingest.phantom_case import LABELS, REPORT, Case, Device, Draw, Opacity

STATED, DENIED, HEDGED = 1, 0, -1

NOUNS = {
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement", "enlargement of the heart"),
    "Edema": ("pulmonary edema", "edema", "interstitial edema"),
    "Lung Opacity": ("focal consolidation", "lung opacity", "airspace opacity", "focal opacity", "consolidation"),
    "Pleural Effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "Pneumothorax": ("pneumothorax", "PTX"),
    "Support Devices": ("support devices", "lines or tubes", "indwelling devices", "support lines or tubes"),
}
_DENIALS = ("No {}.", "No evidence of {}.", "There is no {}.", "Negative for {}.", "No {} is seen.", "No {} identified.")
_ALONE = {
    "Cardiomegaly": ("Heart size is normal.", "The heart is not enlarged.", "Normal cardiac silhouette.", "The cardiac silhouette is normal in size."),
    "Edema": ("No pulmonary edema.", "The pulmonary vasculature is normal.", "No overt pulmonary edema."),
    "Lung Opacity": ("The lungs are clear of consolidation.", "No focal lung opacity.", "No airspace disease.", "No lung opacity."),
    "Pleural Effusion": ("No pleural effusion.", "The costophrenic angles are sharp.", "No pleural fluid on either side.", "Both the right and left costophrenic angles are clear."),
    "Pneumothorax": ("No pneumothorax.", "No pneumothorax on the right or left.", "No visible pneumothorax."),
    "Support Devices": ("No support devices.", "No lines or tubes.", "No support devices are present."),
}
_HEDGES = ("Possible {}.", "Questionable {}.", "{} cannot be excluded.", "Findings may represent {}.", "Equivocal for {}.")
_STATED = {
    "Cardiomegaly": (
        "The heart is {degree} enlarged.", "{degree} cardiomegaly.", "Cardiomegaly is present.", "Enlarged cardiac silhouette.",
        "There is {degree} enlargement of the heart.", "Heart size is {degree} increased.", "{degree} enlarged heart.", "Cardiomegaly.",
    ),
    "Edema": (
        "{degree} pulmonary edema.", "Findings consistent with {degree} pulmonary edema.", "Pulmonary edema is present.", "There is {degree} edema.",
        "Perihilar haze and increased interstitial markings in keeping with {degree} edema.", "{degree} interstitial edema.",
        "Vascular congestion with {degree} interstitial pulmonary edema.", "Pulmonary edema.",
    ),
    "Lung Opacity": (
        "{patch} in the {where}.", "There is {patch} in the {where}.", "{where} opacity.", "{where} consolidation, concerning for pneumonia.",
        "{patch} is seen in the {where}.", "{patch}, {where}.", "Lung opacity in the {where}.", "Lung opacity is present in the {where}.",
    ),
    "Pleural Effusion": (
        "{size} {sides} pleural {effusion}.", "There is {size} {sides} pleural effusion.", "{sides} pleural effusion is {size}.",
        "Blunting of the {sides} costophrenic {angle} from {size} effusion.", "{sides} pleural {effusion}.", "{size} {sides} {effusion}.",
        "Pleural effusion is present {place}.", "Layering {sides} pleural fluid, {size}.",
    ),
    "Pneumothorax": (
        "{size} {sides} pneumothorax.", "There is a {size} {sides} pneumothorax.", "{sides} pneumothorax is present.", "{sides} pneumothorax.",
        "A visceral pleural line is seen on the {sides}, {size} pneumothorax.", "{sides} apical pneumothorax, {size}.", "{size} pneumothorax on the {sides}.",
    ),
}  # fmt: skip
_PATCHES = ("patchy opacity", "airspace opacity", "focal consolidation", "ill-defined opacity", "hazy opacity", "consolidation", "an area of opacity")
_DEVICES = {
    "ett": ("Endotracheal tube tip above the carina.", "ETT in standard position.", "The patient is intubated with an endotracheal tube."),
    "ng": ("Enteric tube courses below the diaphragm.", "Nasogastric tube in the stomach.", "NG tube with tip in the stomach."),
    "cvc": ("{side} internal jugular central venous catheter with tip in the SVC.", "{side} IJ central line in place.", "Central venous catheter from the {side}."),
    "picc": ("{side} PICC terminates in the SVC.", "{side} arm PICC line.", "A {side} PICC line is in place."),
    "pacemaker": ("{side} chest wall pacemaker with two leads.", "Dual-lead pacemaker on the {side}.", "{side} pacemaker in place."),
    "drain": ("{side} chest tube in place.", "A {side} pleural drain is present.", "{side} thoracostomy tube."),
}  # fmt: skip
_ALL_DEVICES = ("Support devices are present.", "Lines and tubes as described.", "Support devices in place.", "Support devices in standard position.")
_NORMAL = ("No acute cardiopulmonary process.", "No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "Unremarkable chest.")
_FILLERS = ("Clinical correlation is recommended.", "No significant interval change.", "Osseous structures are unremarkable.", "No acute fracture.")


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
    sentences = [_state(case, label, draw) for label in LABELS if labels[label] == STATED]
    sentences += [_hedge(label, draw) for label in LABELS if labels[label] == HEDGED]
    sentences = _shuffled(sentences + _deny([label for label in LABELS if labels[label] == DENIED], draw), draw)
    if not any(case.findings.present().values()) and HEDGED not in labels.values() and (not sentences or draw.chance(0.4)):
        sentences.append(draw.pick(_NORMAL))
    sentences = _setting(case, draw) + sentences + ([draw.pick(_FILLERS)] if draw.chance(0.12) else [])
    return Report(text=_layout(sentences, draw), labels=labels)


def _choose(case: Case, draw: Draw) -> dict[str, int | None]:
    """What the report says of each finding. Present ones are nearly always stated, absent ones as the writer pleases."""
    thorough = draw.pick((0.25, 0.5, 0.75, 0.95))
    labels: dict[str, int | None] = {}
    for label, present in case.findings.present().items():
        hedged, told = draw.chance(0.04) and label != "Support Devices", draw.chance(thorough)
        labels[label] = HEDGED if hedged else STATED if present else DENIED if told else None
    return labels


def _state(case: Case, label: str, draw: Draw) -> str:
    """One finding, as a sentence or a few."""
    f = case.findings
    if label == "Cardiomegaly":
        return _fill(draw.pick(_STATED[label]), degree=_grade(f.heart, 0.3, 0.42, ("mildly", "moderately", "severely")))
    if label == "Edema":
        return _fill(draw.pick(_STATED[label]), degree=_grade(f.edema, 0.62, 0.82, ("mild", "moderate", "severe")))
    if label == "Lung Opacity":
        return _fill(draw.pick(_STATED[label]), patch=draw.pick(_PATCHES), where=_where(f.opacities))
    if label == "Pleural Effusion":
        size = _grade(max(e.amount for e in f.effusions), 0.4, 0.75, ("small", "moderate", "large"))
        return _fill(draw.pick(_STATED[label]), size=size, **_sides([e.side for e in f.effusions]))
    if label == "Pneumothorax":
        assert f.pneumothorax is not None
        size = _grade(f.pneumothorax.depth, 0.24, 0.38, ("small", "moderate", "large"))
        return _fill(draw.pick(_STATED[label]), size=size, sides=f.pneumothorax.side)
    return _tubes(f.devices, draw)


def _grade(value: float, low: float, high: float, words: tuple[str, str, str]) -> str:
    return words[(value >= low) + (value >= high)]


def _sides(sides: list[str]) -> dict[str, str]:
    """The words that depend on one side or both."""
    if len(sides) > 1:
        return {"sides": "bilateral", "place": "on both sides", "effusion": "effusions", "angle": "angles"}
    return {"sides": sides[0], "place": f"on the {sides[0]}", "effusion": "effusion", "angle": "angle"}


def _where(opacities: tuple[Opacity, ...]) -> str:
    """ "left lower lung", or "both lungs" with the zones where they agree."""
    zones = [_grade(o.down, 0.36, 0.66, ("upper", "mid", "lower")) for o in opacities]
    if len(opacities) == 1:
        return f"{opacities[0].side} {zones[0]} lung"
    return f"bilateral {zones[0]} lungs" if zones[0] == zones[1] else f"right {zones[0]} and left {zones[1]} lung"


def _tubes(devices: tuple[Device, ...], draw: Draw) -> str:
    told = [_fill(draw.pick(_DEVICES[d.kind]), side=d.side) for d in devices]
    if draw.chance(0.25):
        return draw.pick(_ALL_DEVICES)
    return " ".join([*told, draw.pick(_ALL_DEVICES)] if draw.chance(0.2) else told)


def _fill(template: str, **slots: str) -> str:
    return _capital(template.format(**slots))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _hedge(label: str, draw: Draw) -> str:
    return _capital(draw.pick(_HEDGES).format(NOUNS[label][0]))


def _deny(labels: list[str], draw: Draw) -> list[str]:
    """Denials: some findings in sentences of their own, the others together in one."""
    alone = [label for label in labels if draw.chance(0.45)]
    together = _shuffled([draw.pick(NOUNS[label]) for label in labels if label not in alone], draw)
    sentences = [draw.pick(_ALONE[label]) for label in alone]
    if together:
        listed = ", ".join(together[:-1]) + (" or " if together[:-1] else "") + together[-1]
        sentences.append(draw.pick(_DENIALS).format(listed))
    return sentences


def _setting(case: Case, draw: Draw) -> list[str]:
    """What a report may say before its findings: the view, the breath, the position."""
    e, told = case.exposure, []
    if draw.chance(0.25):
        told.append(draw.pick(("AP portable view.", "Portable chest radiograph.") if e.view == "AP" else ("PA view of the chest.", "Upright PA radiograph.")))
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
