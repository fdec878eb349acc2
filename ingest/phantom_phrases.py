"""The phrases of the phantom's reports. Each is unambiguous about its label, so that labels follow from the choice."""

NOUNS = {
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Edema": ("pulmonary edema", "edema", "interstitial edema"),
    "Lung Opacity": ("consolidation", "lung opacity", "focal consolidation", "airspace opacity"),
    "Pleural Effusion": ("pleural effusion", "effusion"),
    "Pneumothorax": ("pneumothorax",),
    "Support Devices": ("lines or tubes",),
}
"""What a finding is called where it is denied or left open."""

STATED = {
    "Cardiomegaly": (
        "The heart is {degree}ly enlarged.",
        "{degree} cardiomegaly.",
        "Cardiomegaly is present.",
        "Enlarged cardiac silhouette.",
        "There is {degree} enlargement of the heart.",
        "{degree}ly enlarged heart.",
        "Cardiomegaly.",
    ),
    "Edema": (
        "{degree} pulmonary edema.",
        "Findings consistent with {degree} pulmonary edema.",
        "Pulmonary edema is present.",
        "There is {degree} edema.",
        "Perihilar haze and increased interstitial markings in keeping with {degree} edema.",
        "{degree} interstitial edema.",
        "Vascular congestion with {degree} interstitial pulmonary edema.",
        "Pulmonary edema.",
    ),
    "Lung Opacity": (
        "{patch} in the {where}.",
        "There is {patch} in the {where}.",
        "{where} opacity.",
        "{where} consolidation, concerning for pneumonia.",
        "{patch} is seen in the {where}.",
        "{patch}, {where}.",
        "Lung opacity in the {where}.",
        "Lung opacity is present in the {where}.",
    ),
    "Pleural Effusion": (
        "{size} {sides} pleural {effusion}.",
        "There is {size} {sides} pleural effusion.",
        "{sides} pleural effusion is {size}.",
        "{sides} pleural {effusion}.",
        "{size} {sides} {effusion}.",
        "Pleural effusion is present {place}.",
        "Layering {sides} pleural fluid, {size}.",
        "Dependent {sides} pleural fluid, {size}.",
    ),
    "Pneumothorax": (
        "{size} {sides} pneumothorax.",
        "There is a {size} {sides} pneumothorax.",
        "{sides} pneumothorax is present.",
        "{sides} pneumothorax.",
        "A visceral pleural line is seen on the {sides}, {size} pneumothorax.",
        "{sides} apical pneumothorax, {size}.",
        "{size} pneumothorax on the {sides}.",
    ),
}
"""Sentences that state a finding; the slots are filled with what is on the film."""

PATCHES = (
    "patchy opacity",
    "airspace opacity",
    "focal consolidation",
    "ill-defined opacity",
    "hazy opacity",
    "consolidation",
    "an area of opacity",
)
"""Words for an opacity."""

DEVICES = {
    "ett": (
        "Endotracheal tube tip above the carina.",
        "ETT in standard position.",
        "The patient is intubated with an endotracheal tube.",
    ),
    "ng": (
        "Enteric tube courses below the diaphragm.",
        "Nasogastric tube in the stomach.",
        "NG tube with tip in the stomach.",
    ),
    "cvc": (
        "{side} internal jugular central venous catheter with tip in the SVC.",
        "{side} IJ central line in place.",
        "Central venous catheter from the {side}.",
    ),
    "picc": ("{side} PICC terminates in the SVC.", "{side} arm PICC line.", "A {side} PICC line is in place."),
    "pacemaker": (
        "{side} chest wall pacemaker with two leads.",
        "Dual-lead pacemaker on the {side}.",
        "{side} pacemaker in place.",
    ),
    "drain": ("{side} chest tube in place.", "A {side} pleural drain is present.", "{side} thoracostomy tube."),
}
"""Sentences per kind of device."""

ALL_DEVICES = (
    "Support devices are present.",
    "Support devices as described.",
    "Support devices in place.",
    "Support devices in standard position.",
)
"""Sentences for devices of any kind."""

DENIALS = ("No {}.", "No {}.", "No evidence of {}.", "There is no {}.", "No {} is seen.")
"""Sentences that deny one noun or two."""

ALONE = {
    "Cardiomegaly": (
        "Heart size is normal.",
        "The heart is normal in size.",
        "Normal heart size.",
        "The cardiac contour is normal.",
    ),
    "Edema": (
        "The pulmonary vasculature is normal.",
        "Normal pulmonary vascularity.",
        "The vasculature is unremarkable.",
    ),
    "Lung Opacity": (
        "No infiltrate.",
        "The lungs are free of infiltrate.",
        "The airspaces are clear.",
        "Clear airspaces.",
    ),
    "Pleural Effusion": (
        "The costophrenic angles are sharp.",
        "Sharp costophrenic angles.",
        "Both the right and left costophrenic angles are sharp.",
    ),
    "Pneumothorax": (
        "The lungs are fully expanded.",
        "Both lungs are fully expanded.",
        "The right and left lung are fully expanded.",
    ),
    "Support Devices": ("No lines or tubes.", "Free of lines and tubes.", "There are no lines or tubes."),
}
"""Sentences that deny one finding, mostly in words of their own, as radiologists describe what is normal."""

HEDGES = ("Possible {}.", "Questionable {}.", "Findings may represent {}.", "Equivocal for {}.")
"""Sentences that leave a noun open."""

NORMAL = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "Unremarkable chest.",
)
"""Sentences for a film without any finding."""

FILLERS = (
    "Clinical correlation is recommended.",
    "No significant interval change.",
    "Osseous structures are unremarkable.",
    "No acute fracture.",
)
"""Sentences that say nothing of the findings."""
