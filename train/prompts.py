"""What a finding is called in words: a positive and a negative prompt, compared by CheXzero's softmax.

reports    PROMPTS, the 14 CheXpert labels as reports say and deny them: "the costophrenic angles are sharp" rather
           than "no pleural effusion", whose words the positive side has too; the pair for all others. Several
           phrasings of one side are averaged, with a finding's side balanced among them
chexzero   CheXzero's pair for every label (Tiu et al., 2022): `{label}` against `no {label}`
listed     for texts made of labels by ingest's --text-template ("Effusion|Mass. PA view."): they never say
           "no mass"; a film without a mass is most often called "No Finding"

A file of one's own, in the form of chexpert.toml beside this one, goes before any of them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.errors import InputError

Style = Literal["reports", "chexzero", "listed"]
NORMAL = "No Finding"
"""What CheXpert and NIH call the absence of all other findings."""
MAX_BYTES = 1 << 20
SHIPPED = Path(__file__).with_name("chexpert.toml")


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


ALIASES = {"Effusion": "Pleural Effusion", "Infiltration": "Infiltrate", "Hernia": "Hiatal Hernia"}
"""A label of NIH's 14 that reports call otherwise -> what they call it."""


def read_prompts(path: Path) -> dict[str, Prompt]:
    """Label -> prompts from a TOML file, a table a label with lists `positive` and `negative`. InputError says what is
    wrong with it."""
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise InputError(f"the prompts {path} are no file of at most {MAX_BYTES:,} bytes")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the prompts {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML ({error})") from None
    if not tables:
        raise InputError(f"{path} holds no prompts; it takes a table a label, as {SHIPPED} has them")
    return {label: _prompt(path, label, table) for label, table in tables.items()}


def _prompt(path: Path, label: str, table: Any) -> Prompt:
    if not isinstance(table, dict) or set(table) != {"positive", "negative"}:
        raise InputError(f'{path}: ["{label}"] has to hold two lists, `positive` and `negative`, and nothing else')
    for side, texts in table.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f'{path}: `{side}` of ["{label}"] has to be a list of one or more texts')
    return Prompt(positive=tuple(table["positive"]), negative=tuple(table["negative"]))


PROMPTS = read_prompts(SHIPPED)
"""Label column -> prompts, where the default pair would not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How all labels of an evaluation are put into words."""

    style: Style = "reports"
    forms: tuple[str, ...] = ("{}",)
    """Sentences that every phrasing stands in, `{}` in its place: `{}. PA view.`; averaged."""
    own: Mapping[str, Prompt] = field(default_factory=dict)
    """Label -> prompts that go before the style's."""

    def __post_init__(self) -> None:
        for form in self.forms or ("",):
            if "{}" not in form:
                raise InputError(f"--prompt-forms {form!r} has no {{}} where the finding would stand")

    def prompt(self, label: str, labels: tuple[str, ...]) -> Prompt:
        """The prompts of one of the data set's labels."""
        own = self.own.get(label) or self.own.get(ALIASES.get(label, label))
        bare = own or prompt_for(label, self.style, labels=labels)
        sides = ([form.replace("{}", text) for text in side for form in self.forms] for side in bare.sides)
        positive, negative = map(tuple, sides)
        return Prompt(positive=positive, negative=negative)

    def unused(self, labels: tuple[str, ...]) -> list[str]:
        """Labels of `own` that the data set does not have: a name that is spelt otherwise there, perhaps."""
        return sorted(set(self.own) - {*labels, *(ALIASES.get(label, label) for label in labels)})


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
