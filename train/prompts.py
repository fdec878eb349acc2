"""What a finding is called in words: a positive and a negative prompt, compared by CheXzero's softmax.

The default is CheXzero's pair, `{label}` against `no {label}` (Tiu et al., 2022). Labels whose negation is said in
another way in reports stand in PROMPTS. Several phrasings of one side are averaged.
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
    "Edema": Prompt(positive=("pulmonary edema",), negative=("no pulmonary edema",)),
}
"""Label column -> prompts, where the default pair would not say it."""


def prompt_for(label: str) -> Prompt:
    """The prompts of a label column."""
    name = label.lower()
    return PROMPTS.get(label, Prompt(positive=(name,), negative=(f"no {name}",)))
