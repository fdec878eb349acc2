"""What a finding is called in words: a positive and a negative prompt, compared by CheXzero's softmax.

The default is CheXzero's pair, `{label}` against `no {label}` (Tiu et al., 2022). Labels that reports deny in other
words stand in PROMPTS: "the costophrenic angles are sharp" rather than "no pleural effusion", whose words the positive
side has too. Several phrasings of one side are averaged, with a finding's side balanced among them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Two sides of one label."""

    positive: tuple[str, ...]
    """Phrasings that say the finding is there."""
    negative: tuple[str, ...]
    """Phrasings that say it is not."""


PROMPTS: dict[str, Prompt] = {
    "No Finding": Prompt(
        positive=("no acute cardiopulmonary abnormality", "normal chest radiograph"),
        negative=("abnormal chest radiograph", "acute cardiopulmonary abnormality"),
    ),
    "Cardiomegaly": Prompt(
        positive=("Cardiomegaly is present.", "Enlarged cardiac silhouette.", "The heart is moderately enlarged."),
        negative=("Heart size is normal.", "The heart is normal in size."),
    ),
    "Edema": Prompt(
        positive=("Pulmonary edema is present.", "Findings consistent with moderate pulmonary edema."),
        negative=("The pulmonary vasculature is normal.", "Normal pulmonary vascularity."),
    ),
    "Lung Opacity": Prompt(
        positive=(
            "Lung opacity in the right mid lung.",
            "Lung opacity in the left mid lung.",
            "Patchy opacity is seen in the right lower lung.",
            "Airspace opacity in the left upper lung.",
        ),
        negative=("The airspaces are clear.", "No infiltrate."),
    ),
    "Pleural Effusion": Prompt(
        positive=("Right pleural effusion.", "Left pleural effusion.", "Pleural effusion is present on both sides."),
        negative=("The costophrenic angles are sharp.", "Sharp costophrenic angles."),
    ),
    "Pneumothorax": Prompt(
        positive=("Right pneumothorax.", "Left pneumothorax is present.", "There is a moderate right pneumothorax."),
        negative=("The lungs are fully expanded.", "Both lungs are fully expanded."),
    ),
    "Support Devices": Prompt(
        positive=(
            "Support devices are present.",
            "Support devices in place.",
            "Endotracheal tube tip above the carina.",
        ),
        negative=("No lines or tubes.", "Free of lines and tubes."),
    ),
}
"""Label column -> prompts, where the default pair would not say it."""


def prompt_for(label: str) -> Prompt:
    """The prompts of a label column."""
    name = label.lower()
    return PROMPTS.get(label, Prompt(positive=(name,), negative=(f"no {name}",)))
