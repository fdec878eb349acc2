"""What a finding is called in words: a positive and a negative prompt, compared by CheXzero's softmax.

reports    PROMPTS, for labels that reports deny in words of their own: "the costophrenic angles are sharp" rather
           than "no pleural effusion", whose words the positive side has too; the pair for all others. Several
           phrasings of one side are averaged, with a finding's side balanced among them
chexzero   CheXzero's pair for every label (Tiu et al., 2022): `{label}` against `no {label}`
listed     for texts made of labels by ingest's --text-template ("Effusion|Mass. PA view."): they never say
           "no mass"; a film without a mass is most often called "No Finding"
"""

from dataclasses import dataclass
from typing import Literal

from shards.errors import InputError

Style = Literal["reports", "chexzero", "listed"]
NORMAL = "No Finding"
"""What CheXpert and NIH call the absence of all other findings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Two sides of one label."""

    positive: tuple[str, ...]
    """Phrasings that say the finding is there."""
    negative: tuple[str, ...]
    """Phrasings that say it is not."""

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive, negative."""
        return self.positive, self.negative


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


ALIASES = {
    "Effusion": "Pleural Effusion",
    "Infiltration": "Infiltrate",
    "Hernia": "Hiatal Hernia",
    "Pleural Other": "Pleural Thickening",
}
"""A label of NIH's 14 or CheXpert's 14 that reports call otherwise -> what they call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How all labels of an evaluation are put into words."""

    style: Style = "reports"
    forms: tuple[str, ...] = ("{}",)
    """Sentences that every phrasing stands in, `{}` in its place: `{}. PA view.`; averaged."""

    def __post_init__(self) -> None:
        for form in self.forms or ("",):
            if "{}" not in form:
                raise InputError(f"--prompt-forms {form!r} has no {{}} where the finding would stand")

    def prompt(self, label: str, labels: tuple[str, ...]) -> Prompt:
        """The prompts of one of the data set's labels."""
        bare = prompt_for(label, self.style, labels=labels)
        sides = ([form.replace("{}", text) for text in side for form in self.forms] for side in bare.sides)
        positive, negative = map(tuple, sides)
        return Prompt(positive=positive, negative=negative)


def prompt_for(label: str, style: Style = "reports", *, labels: tuple[str, ...] = ()) -> Prompt:
    """The prompts of a label column. `listed` needs all of the data set's labels, for what "No Finding" denies."""
    if style == "listed":
        # As the label column writes it, underscores too, for so do the texts.
        others = tuple(name for name in labels if name != NORMAL) or ("abnormal",)
        return Prompt(positive=(label,), negative=others if label == NORMAL else (NORMAL,))
    known = ALIASES.get(label, label) if style == "reports" else label
    if style == "reports" and known in PROMPTS:
        return PROMPTS[known]
    name = known.replace("_", " ").lower()
    return Prompt(positive=(name,), negative=(f"no {name}",))
