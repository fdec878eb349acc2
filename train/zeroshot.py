"""CheXzero's zero-shot method (Tiu et al., Nature Biomedical Engineering 2022): findings by their names alone.

An image is compared with a prompt that names the finding and one that denies it, and the softmax of the two
similarities is the finding's probability. Images are resized as in training and not augmented. The prompts:

reports    PROMPTS, the 14 CheXpert labels as reports say and deny them: "the costophrenic angles are sharp" rather
           than "no pleural effusion", whose words the positive side has too; the pair for all others. Several
           phrasings of one side are averaged, with a finding's side balanced among them
chexzero   CheXzero's pair for every label: `{label}` against `no {label}`
listed     for texts made of labels by ingest's --text-template ("Effusion|Mass. PA view."): they never say
           "no mass"; a film without a mass is most often called "No Finding"

A file of one's own, in the form of chexpert.toml beside this one, goes before any of them.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.config import LoaderConfig
from pipeline.read import ReadStats, retried
from shards.errors import InputError
from shards.reader import ShardReader
from shards.schema import Manifest
from train.commandline import read_text
from train.device import choose_precision
from train.objective import contrastive_loss, embed_split
from train.ranks import Ranks
from train.scores import Floats

Style = Literal["reports", "chexzero", "listed"]
NORMAL = "No Finding"
"""What CheXpert and NIH call the absence of all other findings."""
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
    tables = read_text(path, tomllib.loads, "the prompts", "TOML")
    if not tables:
        raise InputError(f"{path} holds no prompts; it takes a table a label, as {SHIPPED} has them")
    return {label: _prompt(path, label, table) for label, table in tables.items()}


def _prompt(path: Path, label: str, table: Any) -> Prompt:
    if not isinstance(table, dict) or set(table) != {"positive", "negative"}:
        raise InputError(f'{path}: ["{label}"] has to hold two lists, `positive` and `negative`, and nothing else')
    for side, texts in table.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f'{path}: `{side}` of ["{label}"] has to be a list of one or more texts')
    if set(table["positive"]) == set(table["negative"]):
        raise InputError(f'{path}: both sides of ["{label}"] say the same, which tells nothing')
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


def listed_note(wording: Wording, loader: LoaderConfig, manifest: Manifest) -> list[str]:
    """What to say where the reports, by all of one block, name each film's labels as the columns do, and no others:
    prompts of another form than such texts can turn a score upside down."""
    if wording.style == "listed" or wording.own or not manifest.labels:
        return []
    with ShardReader(loader.shards, manifest, manifest.splits[loader.split][0]) as reader:
        texts = retried(lambda: reader.read_text(0), ReadStats())
        labels = retried(lambda: reader.read_rows(0), ReadStats()).labels  # (rows, K)
    named = np.array([[label in text for label in manifest.labels] for text in texts])
    if not named.any() or (named != (labels == 1)).any():
        return []
    return ["the reports are made of the labels' names, the prompts are not: see --prompts listed, --prompt-forms"]


TOKENIZER = "clip-bpe"
"""The manifest's name for open_clip's tokenizer, which the prompts need as well."""
_WORDING = Wording()


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What one model, or several, make of a split's N rows, in row order."""

    probabilities: Floats
    """(N, K) of the data set's labels."""
    labels: NDArray[np.float32]
    """(N, K): 1 present, 0 absent, -1 uncertain, NaN unknown."""
    images: torch.Tensor
    """(N, D) float32 of unit length, on the device."""
    texts: torch.Tensor
    """(N, D) float32 of unit length, on the device."""
    loss: float
    """Validation loss, as in the loop."""

    def __len__(self) -> int:
        return len(self.labels)


def predict(
    model: nn.Module,
    loader: LoaderConfig,
    *,
    manifest: Manifest,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    wording: Wording = _WORDING,
) -> Predicted:
    """Embed the split that `loader` (mode `eval`) names, once, and compare it with the prompts.

    InputError where the vectors are not finite.
    """
    place = torch.device(device)
    embedded = embed_split(model, loader, choose_precision(precision, place), Ranks())
    if not (embedded.images.isfinite().all() and embedded.texts.isfinite().all()):  # which would sort somehow
        raise InputError("the model's vectors are not finite: its training ran away; evaluate an earlier checkpoint")
    columns = [
        probabilities(embedded.images, *embed_prompts(model, label, manifest, place, wording)).cpu().numpy()
        for label in manifest.labels
    ]
    scale = model.logit_scale.detach().float().exp()  # type: ignore[operator]
    return Predicted(
        probabilities=np.stack(columns, axis=1) if columns else np.empty((len(embedded), 0)),
        labels=embedded.labels.cpu().numpy(),
        images=embedded.images,
        texts=embedded.texts,
        loss=contrastive_loss(embedded.images, embedded.texts, scale).item(),
    )


def probabilities(images: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """CheXzero's softmax over the similarities of images (N, D) with two prompts (D,), all of unit length: (N,).

    There is no temperature in it, so they stay near 0.5, where float32 would make ties of unequal ones: float64.
    """
    pair = images @ torch.stack([positive, negative], dim=1)  # (N, 2)
    return pair.double().softmax(dim=1)[:, 0]


def embed_prompts(
    model: nn.Module, label: str, manifest: Manifest, device: torch.device, wording: Wording = _WORDING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's positive and negative prompt as unit vectors (D,) on the device; several phrasings are averaged."""
    prompt = wording.prompt(label, manifest.labels)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        sides = []
        for texts in prompt.sides:
            tokens = tokenize(texts, manifest).to(device)
            if tokens[:, -1].any():  # it may have been cut, and would be read without its end
                raise InputError(f"a prompt of {label} takes all {tokens.shape[1]} tokens, or more; make it shorter")
            vectors = F.normalize(model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
            sides.append(F.normalize(vectors.mean(dim=0), dim=-1))
    model.train(was_training)
    return sides[0], sides[1]


def tokenize(texts: Sequence[str], manifest: Manifest) -> torch.Tensor:
    """Token ids (texts, context) int64, as ingest made those of the reports."""
    from open_clip.tokenizer import SimpleTokenizer

    spec = manifest.tokenizer
    if spec.name != TOKENIZER:
        raise InputError(f"the shards' tokens are from {spec.name!r}; prompts can be made with {TOKENIZER!r} only")
    return SimpleTokenizer(context_length=spec.context)(list(texts))
